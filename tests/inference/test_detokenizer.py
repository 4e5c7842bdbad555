"""Incremental detokenizer: characters of many tokens, and any bytes, in a stream as in one piece."""

import random

import pytest

from megatron_q3n.data.tokenizer import TextTokenizer, train_bpe
from megatron_q3n.inference.detokenizer import IncrementalDetokenizer

TEXTS = ["漢字かな交じり文", "สวัสดีชาวโลก", "🙂👩‍👩‍👧🇮🇹", "naïve é!", "a�b"]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    """A vocabulary so small that a character has up to four tokens."""
    return train_bpe(["hello world"] * 3, 270)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_characters_appear_whole_when_their_last_byte_comes(tokenizer: TextTokenizer, text: str, step: int) -> None:
    detokenizer, ids = IncrementalDetokenizer(tokenizer, frozenset({tokenizer.eod})), tokenizer.encode(text)
    pieces = [detokenizer.add([*ids[i : i + step], tokenizer.eod]) for i in range(0, len(ids), step)]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""


def test_a_partial_character_before_the_end_of_others(tokenizer: TextTokenizer) -> None:
    """More than four tokens in a row that end inside a character: its first bytes merge with what is before it."""
    merged = train_bpe(["a漢字"] * 50, 259)
    text = "漢字漢字漢字漢字"
    ids = merged.encode(text)
    detokenizer = IncrementalDetokenizer(merged, frozenset())
    assert "".join(detokenizer.add([token]) for token in ids) == text


def test_any_tokens_give_the_text_of_the_tokenizer(tokenizer: TextTokenizer) -> None:
    generator = random.Random(1)
    for _ in range(500):
        ids = [generator.randrange(tokenizer.vocab_size) for _ in range(generator.randrange(12))]
        detokenizer = IncrementalDetokenizer(tokenizer, frozenset())
        assert "".join(detokenizer.add([token]) for token in ids) + detokenizer.flush() == tokenizer.decode(ids)


def test_bytes_of_every_token(tokenizer: TextTokenizer) -> None:
    for token, count in enumerate(tokenizer.token_num_bytes()):
        is_special = token in tokenizer.special_ids.values()
        assert len(tokenizer.token_bytes(token)) == (len("<|endoftext|>") if is_special else count)
    assert tokenizer.token_bytes(10**6) == b""
