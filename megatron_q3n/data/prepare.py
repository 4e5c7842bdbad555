"""Parallel tokenization of text into a prepared folder, with output in the order of the input.

The parent process streams raw documents in batches of about a megabyte; worker processes parse and tokenize them
(encoding_workers.py); the parent writes the results in order. Nothing here imports torch or megatron-core.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_q3n.config import UserError
from megatron_q3n.data.encoding import MAX_NAMED, EncodedBatch
from megatron_q3n.data.encoding_workers import EncodingJob, encode_in_order
from megatron_q3n.data.folders import publish
from megatron_q3n.data.manifest import MANIFEST_FILE, Manifest, Settings, SourceRecord
from megatron_q3n.data.preparation_progress import progress
from megatron_q3n.data.readers import MAX_DOCUMENT_CHARACTERS, RawDocument, read_documents, text_of
from megatron_q3n.data.sources import Format, Source, find_sources, left_out_files
from megatron_q3n.data.tokenizer import TextTokenizer, train_bpe
from megatron_q3n.data.writer import PreparedWriter

_BATCH_BYTES = 2**20
_BATCH_DOCUMENTS = 4096
# folders of a preparation that holds out a share
TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Preparation:
    """Options of one preparation. Exactly one of `tokenizer` and `train_tokenizer` is set.

    train_tokenizer: vocabulary size of a BPE tokenizer trained on the first `tokenizer_sample_mib` of the input.
    workers: number of worker processes; 0 is one per core.
    max_bad_lines: lines that cannot be read are skipped up to this number.
    validation_percent: share of the documents, by the hash of their text, that is written to a folder of its own.
    """

    inputs: tuple[str, ...]
    output: Path
    tokenizer: Path | None = None
    train_tokenizer: int | None = None
    tokenizer_sample_mib: int = 256
    eod_token: str | None = None
    format: Format | None = None
    column: str = "text"
    workers: int = 0
    max_bad_lines: int = 0
    validation_percent: float = 0.0
    force: bool = False
    show_progress: bool = True


@dataclass
class LeftOut:
    """What a preparation leaves out: numbers, and the first ones by name."""

    num_empty: int = 0
    empty: list[str] = field(default_factory=list)
    bad_lines: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return a line for each kind."""
        kinds = [
            (self.num_empty, "empty documents", self.empty),
            (len(self.bad_lines), "bad lines", self.bad_lines),
            (len(self.files), "files of an unknown format", [str(file) for file in self.files]),
        ]
        return [
            f"left out: {count} {kind}: {', '.join(named[:MAX_NAMED])}{', …' if count > MAX_NAMED else ''}"
            for count, kind, named in kinds
            if count
        ]


@dataclass(frozen=True)
class Prepared:
    """The folders that a preparation wrote, with their manifests, and what it left out."""

    manifests: dict[Path, Manifest]
    left_out: LeftOut


def prepare(request: Preparation) -> Prepared:
    """Write a prepared folder, or with `validation_percent` two in one: train/ and validation/.

    Raises: UserError for an invalid request or input, or a disk error; the output folder is unchanged then.
    """
    _check_output(request)
    sources = find_sources(request.inputs, request.format)
    tokenizer = _load_or_train_tokenizer(request, sources)
    left_out = LeftOut(files=left_out_files(request.inputs, request.format))
    parts = [TRAIN, VALIDATION] if request.validation_percent else [""]
    with (
        publish(request.output, setting="--output", replace=request.force) as folder,
        progress(sum(source.size_bytes for source in sources), request.show_progress) as advance,
    ):
        for part in parts:
            (folder / part).mkdir(exist_ok=True)
        writers = [PreparedWriter(folder / part, tokenizer) for part in parts]
        job = EncodingJob(tokenizer, request.column, request.validation_percent / 100)
        workers = request.workers or os.cpu_count() or 1
        for batch, position in encode_in_order(job, _batches(sources, request.column), workers):
            _note_left_out(batch, left_out, request.max_bad_lines)
            for writer, documents in zip(writers, (batch.train, batch.held_out)):
                writer.add(documents)
            advance(position)
        _check_split(request, writers)
        records = [SourceRecord(path=str(s.path), size_bytes=s.size_bytes) for s in sources]
        manifests = [
            writer.finish(records, _settings(request, part), len(left_out.bad_lines))
            for part, writer in zip(parts, writers)
        ]
    return Prepared(dict(zip((request.output / part for part in parts), manifests)), left_out)


def _note_left_out(batch: EncodedBatch, left_out: LeftOut, max_bad_lines: int) -> None:
    """Count what a batch leaves out.

    Raises: UserError for more bad lines than allowed.
    """
    left_out.num_empty += batch.train.num_skipped_empty
    left_out.empty += batch.empty[: MAX_NAMED - len(left_out.empty)]
    left_out.bad_lines += batch.bad_lines
    if len(left_out.bad_lines) > max_bad_lines:
        first = left_out.bad_lines[max_bad_lines]
        skipped = f" ({max_bad_lines} bad lines were skipped before it, the bound of --max-bad-lines)"
        raise UserError(first + (skipped if max_bad_lines else ""))


def _check_split(request: Preparation, writers: list[PreparedWriter]) -> None:
    counts = [writer.num_documents for writer in writers]
    total = sum(counts)
    if len(counts) == 2 and total and 0 in counts:
        raise UserError(
            f"--validation-percent {request.validation_percent:g} splits {total} documents into {counts[0]} for "
            f"training and {counts[1]} for validation; choose another share, or give more documents."
        )


def _check_output(request: Preparation) -> None:
    output = request.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not any((output / part / MANIFEST_FILE).is_file() for part in ("", TRAIN)):
        raise UserError(
            f"--output {output} exists and is not a prepared data set (no {MANIFEST_FILE}); it is left "
            "untouched. Choose another folder."
        )
    if not request.force:
        raise UserError(
            f"--output {output} already holds a prepared data set. Choose another folder, or replace it with --force."
        )


def _settings(request: Preparation, part: str) -> Settings:
    """Return the settings that determine the result besides the sources; the number of workers is not one of them."""
    trained = request.train_tokenizer is not None
    return {
        "format": request.format,
        "column": request.column,
        "train_tokenizer": request.train_tokenizer,
        "tokenizer_sample_mib": request.tokenizer_sample_mib if trained else None,
        "max_document_characters": MAX_DOCUMENT_CHARACTERS,
        **({"part": part, "validation_percent": request.validation_percent} if part else {}),
    }


def _load_or_train_tokenizer(request: Preparation, sources: list[Source]) -> TextTokenizer:
    if request.tokenizer is not None:
        return TextTokenizer.load(request.tokenizer, request.eod_token)
    assert request.train_tokenizer is not None, "the command line requires one of the two"
    texts = _texts(sources, request.column, skips_bad_lines=request.max_bad_lines > 0)
    sample = _first_bytes(texts, request.tokenizer_sample_mib * 2**20)
    return train_bpe(sample, request.train_tokenizer)


def _texts(sources: list[Source], column: str, *, skips_bad_lines: bool) -> Iterator[str]:
    """Yield the texts of the input; skipped lines are counted when the input is tokenized."""
    for source in sources:
        for document in read_documents(source, column):
            try:
                yield text_of(document, column)
            except UserError:
                if not skips_bad_lines:
                    raise


def _first_bytes(texts: Iterator[str], limit_bytes: int) -> Iterator[str]:
    """Yield texts until their UTF-8 bytes reach the limit."""
    num_bytes = 0
    for text in texts:
        yield text
        num_bytes += len(text.encode("utf-8"))
        if num_bytes >= limit_bytes:
            return


def _batches(sources: list[Source], column: str) -> Iterator[tuple[list[RawDocument], int]]:
    """Yield batches of documents, across file boundaries, each with the bytes of input read so far."""
    batch: list[RawDocument] = []
    size = done_bytes = 0
    for source in sources:
        for document in read_documents(source, column):
            batch.append(document)
            size += len(document.payload)
            if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
                yield batch, done_bytes + document.position
                batch, size = [], 0
        done_bytes += source.size_bytes
    if batch:
        yield batch, done_bytes
