"""Parallel tokenization of text into a prepared folder, with output in the order of the input.

The parent process streams raw documents in batches of about a megabyte; worker processes parse and tokenize them; the
parent writes the results in order. At most a few batches per worker exist at any time. Worker processes are spawned,
not forked: they import the tokenizer but not torch, and no lock is copied.
"""

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_q3n.config import UserError
from megatron_q3n.data.encoding import EncodedDocuments, encode_documents
from megatron_q3n.data.folders import publish
from megatron_q3n.data.manifest import MANIFEST_FILE, Manifest, Settings, SourceRecord
from megatron_q3n.data.readers import MAX_DOCUMENT_CHARACTERS, RawDocument, read_documents, text_of
from megatron_q3n.data.sources import Format, Source, find_sources
from megatron_q3n.data.tokenizer import TextTokenizer, train_bpe

_BATCH_BYTES = 2**20
_BATCH_DOCUMENTS = 4096
_BATCHES_PER_WORKER = 4

# progress callback, called with the bytes of input whose tokens are written
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Preparation:
    """Options of one preparation. Exactly one of `tokenizer` and `train_tokenizer` is set.

    train_tokenizer: vocabulary size of a BPE tokenizer trained on the first `tokenizer_sample_mib` of the input.
    workers: number of worker processes; 0 is one per core.
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
    force: bool = False
    show_progress: bool = True


def prepare(request: Preparation) -> Manifest:
    """Write a prepared folder and return its manifest.

    Raises: UserError for an invalid request or input, or a disk error; the output folder is unchanged then.
    """
    _check_output(request)
    sources = find_sources(request.inputs, request.format)
    tokenizer = _load_or_train_tokenizer(request, sources)
    with (
        publish(request.output, setting="--output", replace=request.force) as folder,
        _progress(sources, request.show_progress) as advance,
    ):
        encoded = _encode_in_order(request, sources, tokenizer, advance)
        head = list(itertools.islice(encoded, 1))
        # late: importing torch and megatron-core takes five seconds; a wrong --column is reported before that
        from megatron_q3n.data.writer import PreparedWriter

        writer = PreparedWriter(folder, tokenizer)
        for documents in itertools.chain(head, encoded):
            writer.add(documents)
        records = [SourceRecord(path=str(s.path), size_bytes=s.size_bytes) for s in sources]
        return writer.finish(records, _settings(request))


def _check_output(request: Preparation) -> None:
    output = request.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST_FILE).is_file():
        raise UserError(
            f"--output {output} exists and is not a prepared data set (no {MANIFEST_FILE}); it is left "
            "untouched. Choose another folder."
        )
    if not request.force:
        raise UserError(
            f"--output {output} already holds a prepared data set. Choose another folder, or replace it with --force."
        )


def _settings(request: Preparation) -> Settings:
    """Return the settings that determine the result besides the sources; the number of workers is not one of them."""
    trained = request.train_tokenizer is not None
    return {
        "format": request.format,
        "column": request.column,
        "train_tokenizer": request.train_tokenizer,
        "tokenizer_sample_mib": request.tokenizer_sample_mib if trained else None,
        "max_document_characters": MAX_DOCUMENT_CHARACTERS,
    }


def _load_or_train_tokenizer(request: Preparation, sources: list[Source]) -> TextTokenizer:
    if request.tokenizer is not None:
        return TextTokenizer.load(request.tokenizer, request.eod_token)
    assert request.train_tokenizer is not None, "the command line requires one of the two"
    texts = _texts(sources, request.column)
    sample = _first_bytes(texts, request.tokenizer_sample_mib * 2**20)
    return train_bpe(sample, request.train_tokenizer)


def _texts(sources: list[Source], column: str) -> Iterator[str]:
    for source in sources:
        for document in read_documents(source, column):
            yield text_of(document, column)


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


def _encode_in_order(
    request: Preparation, sources: list[Source], tokenizer: TextTokenizer, advance: Advance
) -> Iterator[EncodedDocuments]:
    """Yield the tokenized batches in input order, from worker processes, or from this one with one worker."""
    workers = request.workers or os.cpu_count() or 1
    column = request.column
    if workers == 1:
        for batch, position in _batches(sources, column):
            yield encode_documents(tokenizer, [text_of(document, column) for document in batch])
            advance(position)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, column)) as pool:
        pending: deque[tuple[Future[EncodedDocuments], int]] = deque()
        try:
            for batch, position in _batches(sources, column):
                pending.append((pool.submit(_encode_on_worker, batch), position))
                if len(pending) >= workers * _BATCHES_PER_WORKER:
                    yield from _pop_oldest(pending, advance)
            while pending:
                yield from _pop_oldest(pending, advance)
        finally:
            # after an error the remaining batches are cancelled
            pool.shutdown(wait=False, cancel_futures=True)


def _pop_oldest(pending: deque[tuple[Future[EncodedDocuments], int]], advance: Advance) -> Iterator[EncodedDocuments]:
    future, position = pending.popleft()
    yield future.result()
    advance(position)


class _Worker:
    """Global state of a worker process, set once at its start."""

    tokenizer: TextTokenizer
    column: str


def _start_worker(tokenizer: TextTokenizer, column: str) -> None:
    # one process per core already
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _Worker.tokenizer = tokenizer
    _Worker.column = column


def _encode_on_worker(batch: list[RawDocument]) -> EncodedDocuments:
    texts = [text_of(document, _Worker.column) for document in batch]
    return encode_documents(_Worker.tokenizer, texts)


@contextmanager
def _progress(sources: list[Source], show: bool) -> Iterator[Advance]:
    """Show a progress bar over the bytes of input if stderr is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    disable = not (show and console.is_terminal)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=disable) as bar:
        task = bar.add_task("", total=sum(source.size_bytes for source in sources))
        yield lambda position: bar.update(task, completed=position)
