"""Worker processes that parse and tokenize batches of documents, with results in the order of the batches.

They are spawned, not forked: they import the tokenizer but not torch, and no lock is copied. A worker ends when its
parent does, however that ends.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait

from megatron_q3n.data.encoding import EncodedBatch, encode_batch
from megatron_q3n.data.readers import RawDocument
from megatron_q3n.data.tokenizer import TextTokenizer

_BATCHES_PER_WORKER = 4


@dataclass(frozen=True)
class EncodingJob:
    """What every batch is encoded with."""

    tokenizer: TextTokenizer
    column: str
    held_out_share: float

    def encode(self, batch: list[RawDocument]) -> EncodedBatch:
        """Encode one batch."""
        return encode_batch(self.tokenizer, batch, self.column, self.held_out_share)


def encode_in_order(
    job: EncodingJob, batches: Iterable[tuple[list[RawDocument], int]], workers: int
) -> Iterator[tuple[EncodedBatch, int]]:
    """Yield the encoded batches in their order, each with its position, from `workers` processes or, with 1, this one.

    At most a few batches per worker exist at any time.
    """
    if workers == 1:
        for batch, position in batches:
            yield job.encode(batch), position
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (job,)) as pool:
        pending: deque[tuple[Future[EncodedBatch], int]] = deque()
        try:
            for batch, position in batches:
                pending.append((pool.submit(_encode, batch), position))
                if len(pending) >= workers * _BATCHES_PER_WORKER:
                    yield _oldest(pending)
            while pending:
                yield _oldest(pending)
        finally:
            # after an error the remaining batches are cancelled
            pool.shutdown(wait=False, cancel_futures=True)


def _oldest(pending: deque[tuple[Future[EncodedBatch], int]]) -> tuple[EncodedBatch, int]:
    future, position = pending.popleft()
    return future.result(), position


class _Worker:
    """Global state of a worker process, set once at its start."""

    job: EncodingJob


def _start_worker(job: EncodingJob) -> None:
    # one process per core already
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Worker.job = job


def _end_with_parent() -> None:
    """Wait until the parent process has ended, and end this one.

    A worker waits for work on a pipe whose other end it holds itself, so it would not see that its parent was killed.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker only"
    wait([parent.sentinel])
    os._exit(1)


def _encode(batch: list[RawDocument]) -> EncodedBatch:
    return _Worker.job.encode(batch)
