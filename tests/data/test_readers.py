"""Readers of text, JSONL, Parquet and saved datasets, compressed or not; and their error messages."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_q3n.config import UserError
from megatron_q3n.data import readers
from megatron_q3n.data.readers import read_documents, text_of
from megatron_q3n.data.sources import find_sources

TEXTS = ["first\r\nline ends stay\n", "zweites ÄÖÜ 数", "", "last"]
JSONL = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def texts(*inputs: object, column: str = "text", format: str | None = None) -> list[str]:
    sources = find_sources([str(path) for path in inputs], format)  # type: ignore[arg-type]
    return [text_of(raw, column) for source in sources for raw in read_documents(source, column)]


def test_every_format_gives_the_same_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL.replace(b"\n", b"\n\n"))  # blank lines do not count
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(JSONL[:50]) + gzip.compress(JSONL[50:]))
    compressed = zstandard.compress(JSONL[:50]) + zstandard.compress(JSONL[50:])
    (tmp_path / "c.ndjson.zst").write_bytes(compressed)
    pq.write_table(pa.table({"text": TEXTS, "id": [0, 1, 2, 3]}), tmp_path / "d.parquet")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "e")
    for name in ("a.jsonl", "b.jsonl.gz", "c.ndjson.zst", "d.parquet", "e"):
        assert texts(tmp_path / name) == TEXTS, name


def test_text_files_are_documents_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "more.md.zst").write_bytes(zstandard.compress(b"# packed"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no")
    assert texts(tmp_path) == [*TEXTS, "# packed"]
    assert texts(tmp_path / "[01].txt") == TEXTS[:2]
    assert texts(tmp_path / "3.txt", tmp_path / "0.txt") == [TEXTS[3], TEXTS[0]]
    (tmp_path / "corpus.dat").write_bytes(JSONL)
    assert texts(tmp_path / "corpus.dat", format="jsonl") == TEXTS


def test_a_long_text_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_CHARACTERS", 100)
    text = "".join(f"line {i} of a long book\n" for i in range(40))
    (tmp_path / "book.txt").write_text(text)
    documents = texts(tmp_path / "book.txt")
    assert "".join(documents) == text
    assert len(documents) > 5
    assert all(document.endswith("\n") and 100 <= len(document) < 130 for document in documents[:-1])


def test_a_null_is_an_empty_document(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "d.parquet")
    assert texts(tmp_path / "d.parquet") == ["a", ""]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"line 3: not JSON \(Unterminated string"),
        (b'{"txt": "x", "n": 1}', r"line 3: no field 'text'. Did you mean 'txt'\? Fields here: txt, n"),
        (b'{"text": 5}', "line 3: field 'text' is int, not a string"),
        (b'["text"]', "line 3: a JSON list, not an object"),
        (b'{"text": "\xff"}', "line 3: not UTF-8"),
        (b'{"text": "\\ud800"}', "line 3: not valid Unicode .surrogates"),
        (b"[" * 100_000, "line 3: not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(UserError, match=message) as caught:
        texts(tmp_path / "a.jsonl")
    assert str(tmp_path / "a.jsonl") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"text\0text", "NUL characters, so it is binary"),
        ("a.txt", b"caf\xe9 au lait", r"not UTF-8 text \(byte 0xe9"),
        ("a.txt.gz", b"not gzip at all", r"cannot be read as .gz \(Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-20], "cannot be read as .gz"),
        ("a.jsonl.zst", b"not zstandard", "cannot be read as .zst"),
        ("a.parquet", b"PAR1 not really", "a.parquet: cannot be read"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts(tmp_path / name)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_cut_archive_is_refused_and_a_whole_one_read(tmp_path: Path, suffix: str) -> None:
    """Text, so that no broken JSON line gives the cut away."""
    text = "".join(f"{i * 7919}\n" for i in range(100_000))
    pack = {"gz": gzip.compress, "zst": zstandard.compress}[suffix]
    file = tmp_path / f"a.txt.{suffix}"
    file.write_bytes(pack(text.encode()))
    assert texts(file) == [text]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"cannot be read as .{suffix} \(.*ended before"):
        texts(file)


def test_tables_without_the_column_or_with_numbers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["x"], "n": [1]}), tmp_path / "d.parquet")
    datasets.Dataset.from_dict({"content": ["x"]}).save_to_disk(tmp_path / "e")
    for name in ("d.parquet", "e"):
        with pytest.raises(UserError, match=r"no field 'contents'. Did you mean 'content'\?.*--column"):
            texts(tmp_path / name, column="contents")
    with pytest.raises(UserError, match="row 1: column 'n' holds int, not text"):
        texts(tmp_path / "d.parquet", column="n")


def test_inputs_that_name_nothing_usable(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "unknown.xyz").write_text("?")
    (tmp_path / "one.txt").write_text("1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.bin").write_text("?")
    dataset = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "both")
    for inputs, message in {
        ("nowhere.jsonl",): "no such file or folder, and as a glob pattern it matches nothing",
        ("empty.txt",): "only empty files",
        ("unknown.xyz",): "its name does not tell the format.*--format",
        ("one.txt", "one.txt"): "given twice",
        ("folder",): "none of its 1 files is of a known format",
        ("both",): "DatasetDict with the splits test, train.*both/test",
    }.items():
        with pytest.raises(UserError, match=message):
            texts(*(tmp_path / name for name in inputs))
