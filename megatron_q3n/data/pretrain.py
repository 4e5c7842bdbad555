"""Batches for pretraining: which samples a step trains on is a function of the step and nothing else.

Sample i of the run is row i of the blend. Step s, micro-batch m, data parallel rank r of R holds the samples

    s · global_batch_size + m · micro_batch_size · R + r · micro_batch_size + (0 … micro_batch_size − 1)

so there is no position to save: a resumed run asks for the batches from its step on, and every layout
that splits the global batch into the same rows sees the same rows.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.utils import Split

from megatron_q3n.config import RunConfig
from megatron_q3n.data.batch import Batch, batch_of_documents, batch_of_rows
from megatron_q3n.data.blend import Blends, Part, load_blends
from megatron_q3n.data.folders import cache_root
from megatron_q3n.data.rows import Rows, RowSource
from megatron_q3n.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class PretrainData:
    """Training and validation rows of a run, and the tokenizer they are written in."""

    config: RunConfig
    blends: Blends
    train_rows: Rows
    validation_rows: Rows

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of every row."""
        return self.blends.tokenizer

    def train_batches(self, first_step: int, dp_rank: int, dp_size: int) -> Iterator[list[Batch]]:
        """Yield, for each step from `first_step` to the last, this rank's micro-batches in order.

        Neither reads nor advances torch's global random state.
        """
        steps = range(first_step, self.config.training.steps)
        workers = self.config.data.num_workers
        yield from self._batches(self.train_rows, steps, dp_rank, dp_size, workers)

    def validation_batches(self, dp_rank: int, dp_size: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each validation batch, the same ones at every call."""
        steps = range(self.config.validation.batches)
        yield from self._batches(self.validation_rows, steps, dp_rank, dp_size, num_workers=0)

    def train_sample_tokens(self, num_samples: int) -> Iterator[np.ndarray]:
        """Yield the first rows that training sees. Shapes: (sequence_length + 1,) int64 each."""
        return (_row(self.train_rows[i]) for i in range(num_samples))

    def validation_sample_tokens(self) -> Iterator[np.ndarray]:
        """Yield all rows that validation sees. Shapes: (sequence_length + 1,) int64 each."""
        num_samples = self.config.validation.batches * self.config.training.global_batch_size
        return (_row(self.validation_rows[i]) for i in range(num_samples))

    def describe(self) -> dict[str, Any]:
        """Return plain facts for logs: tokenizer, folders, their tokens, and passes over each."""
        training, validation = self.config.training, self.config.validation
        length, batch = training.sequence_length, training.global_batch_size
        return {
            "tokenizer": {
                "fingerprint": self.tokenizer.fingerprint,
                "vocab_size": self.tokenizer.vocab_size,
                "eod": self.tokenizer.eod,
            },
            "sequence_length": length,
            "mask_document_boundaries": self.config.data.mask_document_boundaries,
            "train": _describe(self.blends.train, training.steps * batch, length),
            "validation": _describe(self.blends.validation, validation.batches * batch, length),
        }

    def _batches(self, rows: Rows, steps: range, dp_rank: int, dp_size: int, num_workers: int) -> Iterator[list[Batch]]:
        training = self.config.training
        size, per_step = training.micro_batch_size, training.global_batch_size
        num_microbatches, rest = divmod(per_step, size * dp_size)
        assert not rest, f"{per_step} rows do not split over {dp_size} ranks in micro-batches of {size}"
        assert 0 <= dp_rank < dp_size, f"rank {dp_rank} of {dp_size}"
        first_rows = (
            step * per_step + (micro * dp_size + dp_rank) * size for step in steps for micro in range(num_microbatches)
        )
        packing = None
        if self.config.data.mask_document_boundaries:
            packing = (self.tokenizer.eod, self.config.data.document_alignment)
        loader = torch.utils.data.DataLoader(
            rows,
            batch_sampler=(range(first, first + size) for first in first_rows),
            num_workers=num_workers,
            collate_fn=partial(_collate, packing=packing),
            generator=torch.Generator(),  # the loader draws a seed; not from the global generator
        )
        for batches in itertools.batched(loader, num_microbatches):
            yield list(batches)


def build_pretrain_data(
    config: RunConfig, *, is_leader: bool = True, barrier: Callable[[], None] = lambda: None
) -> PretrainData:
    """Check the data and its tokenizer, build what is not cached, and return the rows of this run.

    Exactly one process is the leader, and it is global rank 0: it prepares the corpus and the indices. Every
    process calls `barrier` once, when the leader is done and before the others look.

    Raises: UserError for missing or damaged data, a tokenizer that does not match the data or the model, or less
        data than one sequence.
    """
    if is_leader:
        data = _build(config, may_build=True)
        barrier()
        return data
    if config.data.source == "blend":
        load_blends(config)  # what the leader would refuse is refused here too, before waiting for it
    barrier()
    return _build(config, may_build=False)


def _build(config: RunConfig, may_build: bool) -> PretrainData:
    blends = load_blends(config)
    training = config.training
    cache = cache_root(config.data.cache_dir)
    source = RowSource(cache, training.sequence_length, training.seed, blends.tokenizer, may_build)
    num_train = training.steps * training.global_batch_size
    num_validation = config.validation.batches * training.global_batch_size
    return PretrainData(
        config,
        blends,
        source.rows(blends.train, num_train, Split.train),
        source.rows(blends.validation, num_validation, Split.valid),
    )


def _collate(items: list[dict[str, torch.Tensor]], packing: tuple[int, int] | None) -> Batch:
    """Stack rows; with `packing` (eod, alignment), take the one row as packed documents."""
    names = ("tokens", "labels", "loss_mask")
    tokens_BT, labels_BT, loss_mask_BT = (torch.stack([item[n] for item in items]) for n in names)
    if packing is None:
        return batch_of_rows(tokens_BT, labels_BT, loss_mask_BT)
    return batch_of_documents(tokens_BT, labels_BT, loss_mask_BT, *packing)


def _row(item: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([item["tokens"], item["labels"][-1:]]).numpy()


def _describe(parts: tuple[Part, ...], num_rows: int, sequence_length: int) -> list[dict[str, Any]]:
    total = sum(part.weight for part in parts)
    facts = []
    for part in parts:
        share = part.weight / total
        rows_per_epoch = (part.manifest.num_tokens - 1) // sequence_length
        facts.append(
            {
                "path": str(part.path),
                "share": share,
                "documents": part.manifest.num_documents,
                "tokens": part.manifest.num_tokens,
                "epochs": num_rows * share / rows_per_epoch,
                "documents_sha256": part.manifest.documents_bin.sha256,
            }
        )
    return facts
