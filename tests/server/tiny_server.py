"""A server of a tiny random model in this process, for real HTTP clients; its tokenizer has ChatML and tool markup."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_q3n.config.inference import InferenceConfig
from megatron_q3n.config.serve import ServeConfig
from megatron_q3n.data.chat_template import CHATML, ChatTemplate
from megatron_q3n.data.tokenizer import TextTokenizer, train_bpe
from tests.inference.tiny_model import tiny_model

KEY = "a key of the tests"
VOCAB = 320


def chat_tokenizer() -> TextTokenizer:
    """A small byte-level BPE with the control tokens of ChatML."""
    content = json.loads(train_bpe(["def main(argument):\n    return argument + 1\n"] * 20, 300)._canonical)
    start = max(content["model"]["vocab"].values()) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for number, name in enumerate(("<|im_start|>", "<|im_end|>")):
        content["added_tokens"].append({"id": start + number, "content": name, **flags})
    return TextTokenizer(content, "<|endoftext|>")


@contextmanager
def running(
    alone: Any,
    *,
    template: str = CHATML,
    key: str | None = None,
    model: Any = None,
    draft_depth: int = 0,
    load: Any = None,
    **settings: Any,
) -> Iterator[Any]:
    """Run a server in a thread; its `url` ends with /v1."""
    from megatron_q3n.server.build import ModelServer

    tokenizer = chat_tokenizer()
    model = model or tiny_model(alone, vocab_size=VOCAB, max_position_embeddings=512)

    def refuse(folder: Path) -> None:
        raise OSError(f"no weights in {folder}")

    server: Any = ModelServer(
        model,
        tokenizer,
        ChatTemplate(template, tokenizer),
        load or refuse,
        ServeConfig(port=0, **settings),
        InferenceConfig(draft_depth=draft_depth),
        key,
    )
    server.url, server.tokenizer = f"http://127.0.0.1:{server.port}/v1", tokenizer
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
