"""Rows of JSONL, JSON, Parquet and saved Hugging Face datasets, for conversations and prompts; each with its location.

JSONL may be compressed (.gz, .zst). It is read by the reader of data preparation (readers.py), so that both refuse the
same lines with the same message. A .json file is one list of objects, or JSONL.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_q3n.config import UserError
from megatron_q3n.data.decompression import DAMAGE, ByteStream, unreadable
from megatron_q3n.data.readers import check_unicode, json_object, read_lines, table_rows
from megatron_q3n.data.sources import Source, find_row_sources

_LIST_BYTES = 2**32


class Row(NamedTuple):
    """An object and its location for error messages: file:line, or folder:row."""

    values: dict[str, Any]
    location: str


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield the rows of a file, a folder of files, a saved dataset, or a glob pattern.

    Raises: UserError for a path that cannot be read, naming the file and the line where there is one.
    """
    for source in find_row_sources(str(path)):
        if source.format in ("parquet", "dataset"):
            for number, values in enumerate(table_rows(source), 1):
                yield Row(values, f"{source.path}:{number}")
        elif _is_list(source):
            yield from _read_list(source)
        else:
            for document in read_lines(source):
                yield Row(json_object(document), f"{source.path}:{document.number}")


def _is_list(source: Source) -> bool:
    """Return whether a .json file begins a list; JSONL has an object on every line."""
    if ".json" not in source.path.suffixes:
        return False
    stream = ByteStream(source)
    try:
        return stream.bytes.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except DAMAGE as error:
        raise unreadable(source, error) from None
    finally:
        stream.close()


def _read_list(source: Source) -> Iterator[Row]:
    stream = ByteStream(source)
    try:
        content = stream.bytes.read(_LIST_BYTES)
    except DAMAGE as error:
        raise unreadable(source, error) from None
    finally:
        stream.close()
    if len(content) == _LIST_BYTES:
        raise UserError(f"{source.path}: a JSON list of more than {_LIST_BYTES >> 30} GiB; write it as JSONL.")
    try:
        items = json.loads(content)
    except UnicodeDecodeError as error:
        raise UserError(f"{source.path}: not UTF-8 ({error.reason} at byte {error.start}). Convert it.") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{source.path}: not JSON ({error}). Correct the file.") from None
    for number, item in enumerate(items, 1):
        location = f"{source.path}:item {number}"
        if not isinstance(item, dict):
            raise UserError(f"{location}: a JSON {type(item).__name__}, not an object. Correct or remove it.")
        if b"\\u" in content:
            check_unicode(item, location)
        yield Row(item, location)
