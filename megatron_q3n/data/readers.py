"""Readers of text, JSONL, Parquet and Hugging Face datasets: streams of raw documents, and their parsing into text.

The parent process streams raw documents (a JSON line is not parsed); worker processes parse them with `text_of`. Every
error names the file and the line or row.
"""

import io
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megatron_q3n.config import UserError, suggest
from megatron_q3n.data.decompression import DAMAGE, ByteStream, unreadable
from megatron_q3n.data.sources import Source

# A longer text file is split into several documents at line ends, so that memory stays bounded.
MAX_DOCUMENT_CHARACTERS = 16 * 2**20
_MAX_LINE_BYTES = 2**28
_ROWS_PER_BATCH = 256


class RawDocument(NamedTuple):
    """A document before parsing.

    number: line of a JSONL file, row of a table, or chunk of a text file, from 1. payload: a JSON line, or the text
    itself. position: bytes of the source consumed so far, on disk.
    """

    path: Path
    number: int
    payload: bytes | str
    position: int


def read_documents(source: Source, column: str) -> Iterator[RawDocument]:
    """Stream the documents of one source; `column` is the field of tables.

    Raises: UserError for a file that cannot be decoded, or a missing column.
    """
    match source.format:
        case "text":
            return _read_text(source)
        case "jsonl":
            return read_lines(source)
        case "parquet":
            return _read_parquet(source, column)
        case "dataset":
            return _read_saved_dataset(source, column)


def text_of(document: RawDocument, column: str) -> str:
    """Return the text of a raw document.

    Raises: UserError for a line that is not a JSON object with a string in `column`, or for a lone surrogate, which
        UTF-8 cannot encode.
    """
    text = document.payload
    if isinstance(text, bytes):
        text = _json_text(document, column)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _bad_line(document, f"not valid Unicode ({error.reason})") from None
    return text


def json_object(document: RawDocument) -> dict[str, Any]:
    """Return the object of a JSON line.

    Raises: UserError for a line that is not a JSON object, or holds a lone surrogate.
    """
    row = _parse_line(document)
    # only an escape can hold one: strict UTF-8 has none
    if b"\\u" in document.payload:  # type: ignore[operator]
        check_unicode(row, f"{document.path} line {document.number}")
    return row


def check_unicode(value: Any, location: str) -> None:
    """Raise UserError if a JSON value holds a lone surrogate, which UTF-8 cannot encode."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{location}: not valid Unicode ({error.reason}). Correct or remove the line.") from None


def _json_text(document: RawDocument, column: str) -> str:
    row = _parse_line(document)
    if column not in row:
        raise _bad_line(document, _no_column(column, list(row)))
    if not isinstance(row[column], str):
        raise _bad_line(document, f"field {column!r} is {type(row[column]).__name__}, not a string")
    return row[column]


def _parse_line(document: RawDocument) -> dict[str, Any]:
    try:
        row = json.loads(document.payload)
    except UnicodeDecodeError as error:
        raise _bad_line(document, f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise _bad_line(document, f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise _bad_line(document, f"a JSON {type(row).__name__}, not an object")
    return row


def _bad_line(document: RawDocument, problem: str) -> UserError:
    return UserError(f"{document.path} line {document.number}: {problem}. Correct or remove the line.")


def _no_column(column: str, known: list[str]) -> str:
    names = ", ".join(map(str, known[:20])) or "none"
    return f"no field {column!r}.{suggest(column, known)} Fields here: {names} (choose with --column)"


def _read_text(source: Source) -> Iterator[RawDocument]:
    stream = ByteStream(source)
    try:
        text = io.TextIOWrapper(stream.bytes, encoding="utf-8-sig", errors="strict", newline="")
        for number in itertools.count(1):
            chunk = text.read(MAX_DOCUMENT_CHARACTERS)
            chunk += text.readline(_MAX_LINE_BYTES) if len(chunk) == MAX_DOCUMENT_CHARACTERS else ""
            if "\0" in chunk:
                raise UserError(
                    f"{source.path}: holds NUL characters, so it is binary, not text. Leave it out of the input."
                )
            if not chunk and number > 1:
                return
            yield RawDocument(source.path, number, chunk, stream.position())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source.path}: not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason}). "
            "Convert it, e.g. with iconv -t utf-8, or leave it out."
        ) from None
    except DAMAGE as error:
        raise unreadable(source, error) from None
    finally:
        stream.close()


def read_lines(source: Source) -> Iterator[RawDocument]:
    """Stream the lines of a JSONL file that are not blank. A line ends at a line feed and nowhere else.

    Raises: UserError for a damaged file, or a line too long for JSONL.
    """
    stream = ByteStream(source)
    try:
        for number in itertools.count(1):
            line = stream.bytes.readline(_MAX_LINE_BYTES)
            if len(line) == _MAX_LINE_BYTES:
                raise UserError(f"{source.path} line {number}: longer than {_MAX_LINE_BYTES >> 20} MiB; is it JSONL?")
            if not line:
                return
            if not line.isspace():
                yield RawDocument(source.path, number, line.rstrip(b"\r\n"), stream.position())
    except DAMAGE as error:
        raise unreadable(source, error) from None
    finally:
        stream.close()


def _rows(source: Source, batches: Iterator[list[Any]], num_rows: int, column: str) -> Iterator[RawDocument]:
    """Number the rows of a table; a null counts as an empty text."""
    number = 0
    for batch in batches:
        for value in batch:
            number += 1
            if not isinstance(value, str | None):
                raise UserError(
                    f"{source.path} row {number}: column {column!r} holds {type(value).__name__}, not text."
                )
            yield RawDocument(source.path, number, value or "", source.size_bytes * number // num_rows)


def _read_parquet(source: Source, column: str) -> Iterator[RawDocument]:
    # late: only this format needs it, and the import takes up to a second
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source.path) as table:
            if column not in table.schema_arrow.names:
                raise UserError(f"{source.path}: {_no_column(column, table.schema_arrow.names)}.")
            batches = table.iter_batches(_ROWS_PER_BATCH, columns=[column])
            lists = (batch.column(0).to_pylist() for batch in batches)
            yield from _rows(source, lists, table.metadata.num_rows, column)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(source, error) from None


def _read_saved_dataset(source: Source, column: str) -> Iterator[RawDocument]:
    with _saved_dataset(source) as table:
        if column not in table.column_names:
            raise UserError(f"{source.path}: {_no_column(column, table.column_names)}.")
        batches = table.select_columns([column]).iter(_ROWS_PER_BATCH)
        yield from _rows(source, (batch[column] for batch in batches), len(table), column)


@contextmanager
def _saved_dataset(source: Source) -> Iterator[Any]:
    """Open a folder saved by Hugging Face datasets; damage is a UserError, also while rows are read in the block."""
    # late: only this format needs it, and the import takes two seconds
    import datasets
    import pyarrow as pa

    try:
        yield datasets.load_from_disk(str(source.path))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise unreadable(source, error) from None


def table_rows(source: Source) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file or a saved dataset, with every column.

    Raises: UserError for a damaged table.
    """
    if source.format == "dataset":
        with _saved_dataset(source) as table:
            yield from table
        return
    # late: as above
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source.path) as table:
            for batch in table.iter_batches(_ROWS_PER_BATCH):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise unreadable(source, error) from None
