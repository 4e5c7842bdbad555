"""Manifest of a prepared folder (manifest.json): contents, checksums, and their verification.

A prepared folder is documents.bin and documents.idx (megatron-core's indexed dataset, one item per document, each
ending in the end-of-document token), tokenizer.json and manifest.json. The check at start-up takes a few reads at any
size; `tools/prepare_data.py verify --full` hashes every byte.
"""

import hashlib
import shlex
import struct
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from megatron_q3n.config import UserError
from megatron_q3n.config.section import Section
from megatron_q3n.data.tokenizer import TOKENIZER_FILE, fingerprint_of

MANIFEST_FILE = "manifest.json"
# megatron-core's path prefix: documents.bin and documents.idx
DOCUMENTS = "documents"
FORMAT_VERSION = 1

# documents.idx: magic, version, dtype code, number of items, number of document ends (items + 1)
INDEX_HEADER = struct.Struct("<9sQBQQ")
INDEX_MAGIC = b"MMIDIDX\x00\x00"
DTYPE_CODES = {"int32": 4, "uint16": 8}
# length, position, document end
_BYTES_PER_ITEM = 4 + 8 + 8

TokenDtype = Literal["uint16", "int32"]
Settings = dict[str, str | int | float | bool | None]


class FileRecord(Section):
    """Size and SHA-256 of a file at the time of writing."""

    size_bytes: int
    sha256: str


class TokenizerRecord(Section):
    """The tokenizer of the ids."""

    fingerprint: str
    vocab_size: int
    eod_token: str
    eod: int


class SourceRecord(Section):
    """One input file."""

    path: str
    size_bytes: int


class Manifest(Section):
    """The content of manifest.json."""

    format_version: int = FORMAT_VERSION
    num_documents: int
    num_tokens: int
    text_bytes: int
    num_skipped_empty: int
    num_bad_lines: int = 0
    token_dtype: TokenDtype
    tokenizer: TokenizerRecord
    documents_bin: FileRecord
    documents_idx: FileRecord
    sources: list[SourceRecord]
    settings: Settings

    @property
    def files(self) -> dict[str, FileRecord]:
        """The large files by name."""
        return {f"{DOCUMENTS}.bin": self.documents_bin, f"{DOCUMENTS}.idx": self.documents_idx}

    def write(self, folder: Path) -> None:
        """Write manifest.json into a folder."""
        text = self.model_dump_json(indent=2) + "\n"
        (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a prepared folder.

        Raises: UserError if the folder or its manifest is missing, damaged, or of another format.
        """
        file = folder / MANIFEST_FILE
        if not folder.is_dir():
            raise UserError(
                f"data folder {folder} does not exist. Create it with tools/prepare_data.py "
                f"--output {shlex.quote(str(folder))}."
            )
        if not file.is_file():
            raise UserError(
                f"data folder {folder} holds no {MANIFEST_FILE}, so it is not a prepared data set. "
                "Give the --output folder of tools/prepare_data.py."
            )
        try:
            manifest = cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(str(part) for part in problem["loc"]) or "the file"
            raise UserError(f"{file}: {field}: {problem['msg']}. {_remedy(folder)}") from None
        if manifest.format_version != FORMAT_VERSION:
            raise UserError(
                f"{file}: format_version {manifest.format_version}, this code reads {FORMAT_VERSION}. "
                + _remedy(folder)
            )
        return manifest


def token_dtype(vocab_size: int) -> TokenDtype:
    """Return the smallest dtype of megatron-core's indexed datasets that holds every id."""
    return "uint16" if vocab_size <= 65536 else "int32"


def record_file(path: Path) -> FileRecord:
    """Return the size and SHA-256 of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRecord(size_bytes=path.stat().st_size, sha256=digest)


def verify_prepared(path: str | Path, full_hash: bool = False) -> Manifest:
    """Check a prepared folder against its manifest and return the manifest.

    Checks that the files exist, their sizes, the index header and counts, and the tokenizer's fingerprint; with
    `full_hash` also the SHA-256 of the documents.

    Raises: UserError for the first mismatch.
    """
    folder = Path(path).expanduser()
    manifest = Manifest.read(folder)
    for name, record in manifest.files.items():
        _check_size(folder, name, record)
    _check_index(folder, manifest)
    _check_tokenizer(folder, manifest)
    if full_hash:
        for name, record in manifest.files.items():
            if record_file(folder / name).sha256 != record.sha256:
                raise UserError(
                    f"{folder / name}: its content changed since it was prepared (SHA-256 differs from "
                    f"the manifest's {record.sha256[:12]}…). {_remedy(folder)}"
                )
    return manifest


def _remedy(folder: Path) -> str:
    return f"Copy {folder} again from an intact copy, or prepare it again."


def _check_size(folder: Path, name: str, record: FileRecord) -> None:
    file = folder / name
    if not file.is_file():
        raise UserError(f"{file} is missing, its manifest lists it. {_remedy(folder)}")
    size = file.stat().st_size
    if size != record.size_bytes:
        raise UserError(
            f"{file}: {size} bytes, the manifest records {record.size_bytes}; it was truncated or changed. "
            + _remedy(folder)
        )


def _check_index(folder: Path, manifest: Manifest) -> None:
    """Compare the index header, and the file sizes computed from it, with the manifest."""
    file = folder / f"{DOCUMENTS}.idx"
    with file.open("rb") as stream:
        header = stream.read(INDEX_HEADER.size)
    if len(header) < INDEX_HEADER.size or not header.startswith(INDEX_MAGIC):
        raise UserError(f"{file}: not a megatron-core index (bad header). {_remedy(folder)}")
    _, version, code, num_items, num_ends = INDEX_HEADER.unpack(header)
    if (version, code) != (1, DTYPE_CODES[manifest.token_dtype]):
        raise UserError(
            f"{file}: version {version} and token type code {code}, but the manifest requires 1 and "
            f"{manifest.token_dtype}. {_remedy(folder)}"
        )
    if num_items != manifest.num_documents or num_ends != num_items + 1:
        raise UserError(
            f"{file}: {num_items} documents, the manifest records {manifest.num_documents}. {_remedy(folder)}"
        )
    token_bytes = np.dtype(manifest.token_dtype).itemsize
    expected = {
        f"{DOCUMENTS}.idx": INDEX_HEADER.size + num_items * _BYTES_PER_ITEM + 8,
        f"{DOCUMENTS}.bin": manifest.num_tokens * token_bytes,
    }
    for name, size in expected.items():
        if (folder / name).stat().st_size != size:
            raise UserError(
                f"{folder / name}: its size does not fit {manifest.num_documents} documents of "
                f"{manifest.num_tokens} tokens in {manifest.token_dtype}. {_remedy(folder)}"
            )


def _check_tokenizer(folder: Path, manifest: Manifest) -> None:
    fingerprint = fingerprint_of(folder / TOKENIZER_FILE)
    if fingerprint != manifest.tokenizer.fingerprint:
        raise UserError(
            f"{folder / TOKENIZER_FILE}: fingerprint {fingerprint[:12]}…, but the documents were made with "
            f"{manifest.tokenizer.fingerprint[:12]}…; the tokenizer was replaced. {_remedy(folder)}"
        )
