"""Tokenizer and chat template of a post-training run: chosen once, then saved in the run directory."""

import json
from pathlib import Path

from megatron_q3n import checkpoint
from megatron_q3n.checkpoint.folders import FOLDER
from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.conversion.importing import KEPT
from megatron_q3n.data.chat_template import TEMPLATE_FILE, ChatTemplate, chat_template, saved_template
from megatron_q3n.data.conversations import plain_texts
from megatron_q3n.data.manifest import verify_prepared
from megatron_q3n.data.stdlib import load_stdlib_corpus
from megatron_q3n.data.tokenized_conversations import read_source
from megatron_q3n.data.tokenizer import TOKENIZER_SETTINGS_FILE, TextTokenizer, train_bpe
from megatron_q3n.run_directory import TOKENIZER_FOLDER, write_atomically
from megatron_q3n.stages.trained_model import checkpoint_tokenizer


def load_chat_format(config: RunConfig, run_dir: Path) -> tuple[TextTokenizer, ChatTemplate]:
    """Return the tokenizer and template saved in the run directory, or those of the settings and the start checkpoint.

    Raises: UserError if they cannot be found, or the model's vocabulary is smaller than the tokenizer's.
    """
    saved = run_dir / TOKENIZER_FOLDER
    if (saved / TEMPLATE_FILE).is_file():
        tokenizer = TextTokenizer.load(saved)
        return tokenizer, chat_template(None, saved, tokenizer)
    tokenizer, folder = _tokenizer(config)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than model.vocab_size={config.model.vocab_size}; "
            "the model needs an embedding row for every token."
        )
    return tokenizer, chat_template(config.sft.chat_template, folder, tokenizer)


def stop_tokens(source: Path, tokenizer: TextTokenizer) -> frozenset[int]:
    """Return the tokens that end a text of a checkpoint: the end of a document, and of a turn if it has a template."""
    folder = _format_folder(source)
    template = saved_template(folder, tokenizer) if folder is not None else None
    if template is None:
        return frozenset({tokenizer.eod})
    try:
        return frozenset({tokenizer.eod, template.end_of_turn})
    except UserError:
        # a foreign template that ends turns by ordinary text has no such token
        return frozenset({tokenizer.eod})


def save(run_dir: Path, tokenizer: TextTokenizer, template: ChatTemplate) -> None:
    """Save tokenizer and template in the run directory, so that the run and its checkpoints are self-contained."""
    folder = run_dir / TOKENIZER_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    write_atomically(folder / TOKENIZER_SETTINGS_FILE, json.dumps(template.named_tokens, ensure_ascii=False))
    write_atomically(folder / TEMPLATE_FILE, template.source)


def _tokenizer(config: RunConfig) -> tuple[TextTokenizer, Path | None]:
    """Return the tokenizer, and the folder that may hold its chat template."""
    data = config.data
    if config.sft.tokenizer_vocab_size is not None:
        conversations = (conversation for source in config.sft.train for conversation in read_source(source))
        texts = (text for conversation in conversations for text in plain_texts(conversation))
        return train_bpe(texts, config.sft.tokenizer_vocab_size, single_digits=True), None
    if data.tokenizer is not None:
        return TextTokenizer.load(data.tokenizer), Path(data.tokenizer).expanduser()
    if config.checkpoint.load is not None:
        source = checkpoint.find(config.checkpoint.load)
        return checkpoint_tokenizer(source, None), _format_folder(source)
    if data.source == "stdlib":
        return TextTokenizer.load(load_stdlib_corpus(data).train), None
    path = data.train[0].path
    return TextTokenizer.load(path, verify_prepared(path).tokenizer.eod_token), None


def _format_folder(source: Path) -> Path | None:
    """Return the folder with the tokenizer of a checkpoint, which may hold its chat template; None if there is none."""
    saved = source.parent.parent / TOKENIZER_FOLDER if source.parent.name == FOLDER else None
    folders = [source / KEPT, *([saved] if saved else [])]
    return next((f for f in folders if (f / "tokenizer.json").is_file()), None)
