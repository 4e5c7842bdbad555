"""Tokenizers: lossless, byte-exact, deterministic; invalid files are refused with a reason."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_q3n.config import UserError
from megatron_q3n.data.tokenizer import TextTokenizer, fingerprint_of, train_bpe

TRAINED = train_bpe(["def f(x):\n    return x\n\n\nclass A:\n    pass\n" * 9, "übergroß — 数え\r\n"], 280)
ANY_TEXT = st.text() | st.text(alphabet=" \t\n\r_aZ0é数🙂<|endoftext|>")


@given(ANY_TEXT)
def test_any_text_comes_back_and_its_bytes_are_counted(text: str) -> None:
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert TRAINED.token_num_bytes()[ids].sum() == len(text.encode("utf-8"))
    assert TRAINED.encode_batch([text]) == [ids]


def test_text_never_becomes_a_control_token() -> None:
    for tokenizer in (TRAINED, pickle.loads(pickle.dumps(TRAINED))):
        assert tokenizer.eod not in tokenizer.encode("one<|endoftext|>two")
        assert tokenizer.encode_batch(["a<|endoftext|>"]) == [tokenizer.encode("a<|endoftext|>")]
    assert TRAINED.decode([TRAINED.eod]) == "<|endoftext|>"


def test_special_token_counts_no_bytes_and_vocabulary_is_covered() -> None:
    num_bytes_V = TRAINED.token_num_bytes()
    assert num_bytes_V.dtype == np.int64
    assert num_bytes_V.shape == (TRAINED.vocab_size,) == (280,)
    assert num_bytes_V[TRAINED.eod] == 0
    assert (np.delete(num_bytes_V, TRAINED.eod) > 0).all()


def test_indentation_is_one_token() -> None:
    source = "def f(x):\n    return x\n"
    tokens = [TRAINED.decode([i]) for i in TRAINED.encode(source)]
    assert "\n    " in tokens


def test_training_repeats_in_other_processes(tmp_path: Path) -> None:
    code = (
        "from megatron_q3n.data.tokenizer import train_bpe;"
        "print(train_bpe([f'value_{i} = {i * 37 % 101}\\n' for i in range(3000)], 512).fingerprint)"
    )
    root = Path(__file__).parents[2]
    prints = set()
    for seed, threads in (("1", "1"), ("2", "2"), ("3", "2")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "PYTHONPATH": str(root)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        prints.add(done.stdout.strip())
    assert len(prints) == 1


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    TRAINED.save(tmp_path)
    loaded = TextTokenizer.load(tmp_path)
    assert loaded.fingerprint == TRAINED.fingerprint == fingerprint_of(tmp_path / "tokenizer.json")
    assert (loaded.eod, loaded.vocab_size) == (TRAINED.eod, TRAINED.vocab_size)
    assert loaded.encode("x = 1\n") == TRAINED.encode("x = 1\n")


def _foreign(folder: Path, added: list[str], **changes: object) -> Path:
    """Write a tokenizer.json like those on the hub: other special tokens, changed sections."""
    content = json.loads(json.dumps(TRAINED.__reduce__()[1][0])) | changes
    first = content["added_tokens"][0]
    content["added_tokens"] = [
        first | {"content": name, "id": first["id"] if i == 0 else 279 + i} for i, name in enumerate(added)
    ]
    vocab = content["model"]["vocab"]
    del vocab["<|endoftext|>"]
    vocab[added[0]] = 0
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content, indent=1))
    return file


def test_end_of_document_of_foreign_tokenizers(tmp_path: Path) -> None:
    qwen = _foreign(tmp_path, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert TextTokenizer.load(qwen).eod_token == "<|endoftext|>"
    turns = TextTokenizer.load(qwen, eod_token="<|im_end|>")
    assert turns.decode([turns.eod]) == "<|im_end|>"
    other = _foreign(tmp_path, ["<stop>", "<pad>"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert TextTokenizer.load(other).eod_token == "<stop>"
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"no known end-of-document token.*--eod-token.*<pad>, <stop>"):
        TextTokenizer.load(other)
    with pytest.raises(UserError, match=r"has no token '<stp>'.*Did you mean '<stop>'"):
        TextTokenizer.load(other, eod_token="<stp>")


def test_truncation_in_the_file_does_not_cut_documents(tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer = TextTokenizer.load(_foreign(tmp_path, ["<|endoftext|>"], truncation=cut))
    assert len(tokenizer.encode("qwertyuiop")) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "not ByteLevel"),
        ('{"decoder": {"type": "Metaspace"}}', "its decoder is Metaspace"),
        ('{"decoder": "ByteLevel"}', "its decoder is no object"),
        ('{"decoder": ["ByteLevel"]}', "its decoder is"),
        ('{"decoder": {"type": ["ByteLevel"]}}', "its decoder is"),
        ('{"decoder": {"type": "Sequence", "decoders": "ByteLevel"}}', "its decoder is Sequence"),
        ('{"decoder": {"type": "Sequence", "decoders": [null, 3]}}', "its decoder is Sequence"),
        ('{"decoder": {"type": "ByteLevel"}, "added_tokens": {"a": 1}}', "added_tokens is not a list of tokens"),
        (
            '{"decoder": {"type": "ByteLevel"}, "added_tokens": [{"content": 7}]}',
            "added_tokens is not a list of tokens",
        ),
        ("[" * 100_000, "not JSON"),
        (
            '{"decoder": {"type": "ByteLevel"}, "added_tokens": [{"content": "</s>"}]}',
            "the tokenizers library refuses it",
        ),
    ],
)
def test_damaged_tokenizers_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        TextTokenizer.load(file)
    assert str(file) in str(caught.value)


def test_missing_tokenizer_and_tiny_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist.*--train-tokenizer"):
        TextTokenizer.load(tmp_path)
    with pytest.raises(UserError, match="257 or more"):
        train_bpe(["text"], 256)
