"""Exported tokenizers in transformers: the ids, the conversations and the stop tokens of training. Offline."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.config import UserError
from megatron_q3n.conversion.published_tokenizer import published_tokenizer
from megatron_q3n.conversion.run_tokenizer import TokenizerSource
from megatron_q3n.data.chat_template import CHATML, PLAIN, ChatTemplate, TextSegment
from megatron_q3n.data.tokenizer import TextTokenizer, train_bpe

TEXTS = [
    "hello world",
    "def f(x):\n    if x > 10:\n\n\t\treturn [i**2 for i in range(x)]  # squares\n",
    "12345 3.14159 2026-11-30 1,000,000",
    "   leading, trailing and      many spaces   \n\n\n  ",
    "naïve café — Привет, 世界! こんにちは 🙂👩‍👩‍👧 \u00a0\u2028é",
    "it's I'll we've DON'T they're",
    "<|im_start|>user <|im_end|> <|endoftext|><|endoftext|> <|im_",
    "",
]
CONVERSATION = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is 12 + 30?\n"},
    {"role": "assistant", "content": "It's 42."},
    {"role": "user", "content": "  Naïve 🙂?"},
]
BOTH_TOKENS = (
    "{{ bos_token }}{% for message in messages %}\n[{{ message.role }}] {{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}{{ eod_token }}"
)
TWO_ENDS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{{ eod_token }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def plain() -> TextTokenizer:
    return train_bpe(TEXTS * 3, 400, single_digits=True)


@pytest.fixture(scope="module")
def chatml(plain: TextTokenizer) -> TextTokenizer:
    """With the control tokens of Qwen's tokenizer."""
    content = json.loads(plain.content)
    names = ["<|im_start|>", "<|im_end|>"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] += [
        {"id": plain.vocab_size + i, "content": name, "special": True, **flags} for i, name in enumerate(names)
    ]
    return TextTokenizer(content, "<|endoftext|>")


def run_folder(path: Path, tokenizer: TextTokenizer, template: str) -> TokenizerSource:
    """Write what a fine-tuning run keeps of its tokenizer."""
    from megatron_q3n.run_directory import TOKENIZER_FOLDER
    from megatron_q3n.stages import chat_format

    chat_format.save(path, tokenizer, ChatTemplate(template, tokenizer))
    return TokenizerSource(path / TOKENIZER_FOLDER, is_chat_format=True)


def released_folder(path: Path, tokenizer: TextTokenizer) -> Path:
    """Write a tokenizer folder as a chat model is released."""
    path.mkdir()
    tokenizer.save(path)
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "chat_template": CHATML}
    settings |= {"pad_token": "<|endoftext|>", "bos_token": None, "model_max_length": 4096}
    generation = {"eos_token_id": [tokenizer.id_of("<|im_end|>"), tokenizer.eod], "temperature": 0.7}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def in_transformers(folder: Path, source: TokenizerSource, model_type: str = "qwen3_next", **companions: Any) -> Any:
    from transformers import AutoTokenizer

    folder.mkdir()
    published_tokenizer(source, companions.get("folders", []), 512).write(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe_text"])
@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_the_ids_are_ours(name: str, model_type: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    ours: TextTokenizer = request.getfixturevalue(name)
    ours.save(tmp_path)
    own_names = {"eod_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "bos_token": ""}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own_names))
    theirs = in_transformers(tmp_path / "out", TokenizerSource(tmp_path), model_type)
    for text in TEXTS:
        # text as training encodes it: never a control token
        assert theirs(text, split_special_tokens=True).input_ids == ours.encode(text), text
        # and as a template's markup
        ids = theirs(text).input_ids
        assert ids == ChatTemplate(PLAIN, ours).encode([TextSegment(text, False)]), text
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs.eos_token_id == theirs.pad_token_id == ours.eod
    assert theirs.bos_token is None
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": ours.eod, "pad_token_id": ours.eod}


def test_tokens_that_training_does_not_add_are_not_added(plain: TextTokenizer, tmp_path: Path) -> None:
    """Of a post-processor in tokenizer.json, as Llama 3 has, and of fields of tokenizer_config.json."""
    ids, token = [plain.eod], "<|endoftext|>"
    content = json.loads(plain.content)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": ids, "tokens": [token]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": token}))
    theirs = in_transformers(tmp_path / "out", TokenizerSource(tmp_path))
    assert theirs("hello world").input_ids == plain.encode("hello world")
    assert theirs.bos_token == token


@pytest.mark.parametrize(
    ("name", "template", "end_of_turn"),
    [
        ("plain", PLAIN, "<|endoftext|>"),
        ("plain", BOTH_TOKENS, "<|endoftext|>"),
        ("chatml", CHATML, "<|im_end|>"),
        ("chatml", TWO_ENDS, "<|im_end|>"),
    ],
)
def test_conversations_are_ours(
    name: str, template: str, end_of_turn: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ours: TextTokenizer = request.getfixturevalue(name)
    theirs = in_transformers(tmp_path / "out", run_folder(tmp_path / "run", ours, template))
    trained = ChatTemplate(template, ours)
    for is_prompt in (False, True):
        found = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=is_prompt)["input_ids"]
        assert found == trained.encode(trained.render(CONVERSATION, generation_prompt=is_prompt))
    assert theirs.eos_token == end_of_turn
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == (ours.eod if end_of_turn == "<|endoftext|>" else [trained.end_of_turn, ours.eod])
    # the exported template, rendered by us, is unchanged: an export is the start of another fine-tuning
    exported = ChatTemplate((tmp_path / "out" / "chat_template.jinja").read_text(), ours)
    assert exported.render(CONVERSATION) == trained.render(CONVERSATION)


def test_a_released_tokenizer_keeps_its_tokens(chatml: TextTokenizer, tmp_path: Path) -> None:
    released = released_folder(tmp_path / "released", chatml)
    theirs = in_transformers(tmp_path / "out", TokenizerSource(released))
    assert (theirs.eos_token, theirs.pad_token, theirs.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert (theirs.chat_template, theirs.model_max_length) == (CHATML, 4096)
    generation = (tmp_path / "out" / "generation_config.json").read_text()
    assert json.loads(generation) == json.loads((released / "generation_config.json").read_text())


def test_a_fine_tuned_released_model_keeps_its_generation_settings(chatml: TextTokenizer, tmp_path: Path) -> None:
    """From the folder that the run started with; not from one with another tokenizer."""
    released = released_folder(tmp_path / "released", chatml)
    run = run_folder(tmp_path / "run", chatml, CHATML)
    other = released_folder(tmp_path / "other", train_bpe(["other"], 300))
    theirs = in_transformers(tmp_path / "out", run, folders=[other, released])
    assert theirs.eos_token == "<|im_end|>"
    assert theirs.model_max_length == 4096
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["temperature"] == 0.7
    assert generation["eos_token_id"] == [chatml.id_of("<|im_end|>"), chatml.eod]


def test_files_of_two_tokenizers_are_refused(plain: TextTokenizer, tmp_path: Path) -> None:
    plain.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(UserError, match=r"names the special token '<\|im_end\|>', which tokenizer.json does not have"):
        published_tokenizer(TokenizerSource(tmp_path), [], 512)
