"""Prepared folders that differ from their manifest are refused, each kind of damage with its own message."""

import json
from pathlib import Path

import pytest

from megatron_q3n.config import UserError
from megatron_q3n.data.manifest import verify_prepared
from megatron_q3n.data.tokenizer import TextTokenizer, train_bpe

TEXTS = [f"document number {i}\n" * (i + 1) for i in range(5)] + ["", "  \n"]


@pytest.fixture
def folder(make_data) -> Path:  # type: ignore[no-untyped-def]
    return make_data("corpus", TEXTS)


def test_manifest_counts_what_was_written(folder: Path, tokenizer: TextTokenizer) -> None:
    manifest = verify_prepared(folder, full_hash=True)
    kept = [text for text in TEXTS if text.strip()]
    assert manifest.num_documents == 5
    assert manifest.num_skipped_empty == 2
    assert manifest.text_bytes == sum(map(len, kept))
    assert manifest.num_tokens == sum(len(tokenizer.encode(text)) + 1 for text in kept)
    assert manifest.tokenizer.fingerprint == tokenizer.fingerprint
    assert [Path(source.path).name for source in manifest.sources] == ["corpus.jsonl"]
    assert manifest.settings["column"] == "text"


def test_missing_folder_and_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist.*prepare_data.py --output"):
        verify_prepared(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no manifest.json.*not a prepared data set"):
        verify_prepared(tmp_path)


def test_truncated_or_missing_documents(folder: Path) -> None:
    file = folder / "documents.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=rf"documents.bin: {len(whole) - 2} bytes, .* {len(whole)};.*again"):
        verify_prepared(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"documents.bin is missing"):
        verify_prepared(folder)


def test_changed_byte_is_found_by_the_full_check_only(folder: Path) -> None:
    file = folder / "documents.bin"
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)
    verify_prepared(folder)
    with pytest.raises(UserError, match="its content changed since it was prepared"):
        verify_prepared(folder, full_hash=True)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [(0, b"X", "bad header"), (17, b"\x05", "token type code 5"), (18, b"\x63", "99 documents")],
)
def test_damaged_index_header(folder: Path, offset: int, value: bytes, message: str) -> None:
    file = folder / "documents.idx"
    data = bytearray(file.read_bytes())
    data[offset : offset + 1] = value
    file.write_bytes(data)
    with pytest.raises(UserError, match=message):
        verify_prepared(folder)


def _edit(folder: Path, **changes: object) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_counts_that_do_not_fit_the_files(folder: Path) -> None:
    _edit(folder, num_tokens=3)
    with pytest.raises(UserError, match=r"documents.bin: its size does not fit 5 documents of 3 tokens"):
        verify_prepared(folder)


def test_replaced_tokenizer(folder: Path) -> None:
    train_bpe(["some other text, some other tokenizer"] * 9, 270).save(folder)
    with pytest.raises(UserError, match="the tokenizer was replaced"):
        verify_prepared(folder)


def test_damaged_and_future_manifests(folder: Path) -> None:
    _edit(folder, format_version=99)
    with pytest.raises(UserError, match="format_version 99, this code reads 1"):
        verify_prepared(folder)
    _edit(folder, format_version=1, num_tokens="many")
    with pytest.raises(UserError, match="num_tokens: Input should be a valid integer"):
        verify_prepared(folder)
    (folder / "manifest.json").write_text("{cut")
    with pytest.raises(UserError, match="Invalid JSON"):
        verify_prepared(folder)
