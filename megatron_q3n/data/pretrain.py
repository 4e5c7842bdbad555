"""Pretraining batches: the samples of a step are a function of the step alone.

Sample i of the run is sample i of the blend. Step s, micro-batch m, data parallel rank r of R holds the samples

    s · global_batch_size + m · micro_batch_size · R + r · micro_batch_size + (0 … micro_batch_size − 1)

so a checkpoint holds no data position: a resumed run starts at its step, and the global batch is the same in every
parallel layout.
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
from megatron_q3n.data.batch import Batch, causal_batch, packed_batch
from megatron_q3n.data.blend import Blends, PreparedFolder, load_blends
from megatron_q3n.data.folders import cache_root
from megatron_q3n.data.sample_datasets import SampleDataset, SampleDatasetBuilder
from megatron_q3n.data.source_names import distinct_names
from megatron_q3n.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class PretrainData:
    """Training and validation samples of a run, and their tokenizer."""

    config: RunConfig
    blends: Blends
    train_dataset: SampleDataset
    validation_dataset: SampleDataset
    # by name, with its number of batches; empty if the validation blend is one folder
    validation_by_source: dict[str, tuple[SampleDataset, int]]

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of every sample."""
        return self.blends.tokenizer

    def train_batches(self, first_step: int, dp_rank: int, dp_size: int) -> Iterator[list[Batch]]:
        """Yield, for each step from `first_step` to the last, this rank's micro-batches in order.

        Neither reads nor advances torch's global random state.
        """
        steps = range(first_step, self.config.training.steps)
        workers = self.config.data.num_workers
        yield from self._batches(self.train_dataset, steps, dp_rank, dp_size, workers)

    def validation_batches(self, dp_rank: int, dp_size: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each validation batch, the same ones at every call."""
        steps = range(self.config.validation.batches)
        yield from self._batches(self.validation_dataset, steps, dp_rank, dp_size, num_workers=0)

    def validation_sources(self, dp_rank: int, dp_size: int) -> Iterator[tuple[str, Iterator[list[Batch]]]]:
        """Yield the name of each folder of the validation blend and this rank's micro-batches of it alone."""
        for name, (dataset, num_batches) in self.validation_by_source.items():
            yield name, self._batches(dataset, range(num_batches), dp_rank, dp_size, num_workers=0)

    def train_sample_tokens(self, num_samples: int) -> Iterator[np.ndarray]:
        """Yield the first samples of training. Shapes: (sequence_length + 1,) int64 each."""
        return (_tokens(self.train_dataset[i]) for i in range(num_samples))

    def validation_sample_tokens(self) -> Iterator[np.ndarray]:
        """Yield all samples of validation. Shapes: (sequence_length + 1,) int64 each."""
        num_samples = self.config.validation.batches * self.config.training.global_batch_size
        return (_tokens(self.validation_dataset[i]) for i in range(num_samples))

    def describe(self) -> dict[str, Any]:
        """Return a JSON-serializable description for logs: tokenizer, folders, their tokens, and epochs over each."""
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

    def _batches(
        self, dataset: SampleDataset, steps: range, dp_rank: int, dp_size: int, num_workers: int
    ) -> Iterator[list[Batch]]:
        training = self.config.training
        size, per_step = training.micro_batch_size, training.global_batch_size
        num_microbatches, remainder = divmod(per_step, size * dp_size)
        assert not remainder, f"{per_step} samples do not split over {dp_size} ranks in micro-batches of {size}"
        assert 0 <= dp_rank < dp_size, f"rank {dp_rank} of {dp_size}"
        first_samples = (
            step * per_step + (micro * dp_size + dp_rank) * size for step in steps for micro in range(num_microbatches)
        )
        packing = None
        if self.config.data.mask_document_boundaries:
            packing = (self.tokenizer.eod, self.config.data.document_alignment)
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=(range(first, first + size) for first in first_samples),
            num_workers=num_workers,
            collate_fn=partial(_collate, packing=packing),
            # the loader draws a seed: a generator of its own leaves the global one alone
            generator=torch.Generator(),
        )
        for batches in itertools.batched(loader, num_microbatches):
            yield list(batches)


def build_pretrain_data(
    config: RunConfig, *, is_leader: bool = True, barrier: Callable[[], None] = lambda: None
) -> PretrainData:
    """Check the data and its tokenizer, build missing index files, and return the data of this run.

    Global rank 0 is the leader: it prepares the corpus and the indices. Every process calls `barrier` once; the other
    processes read the cache only after it.

    Raises: UserError for missing or damaged data, a tokenizer that does not match the data or the model, or less
        data than one sequence.
    """
    if is_leader:
        data = _build(config, may_build=True)
        barrier()
        return data
    if config.data.source == "blend":
        # raises the leader's errors on every rank, before the barrier
        load_blends(config)
    barrier()
    return _build(config, may_build=False)


def _build(config: RunConfig, may_build: bool) -> PretrainData:
    blends = load_blends(config)
    training = config.training
    cache = cache_root(config.data.cache_dir)
    builder = SampleDatasetBuilder(cache, training.sequence_length, training.seed, blends.tokenizer, may_build)
    num_train = training.steps * training.global_batch_size
    num_validation = config.validation.batches * training.global_batch_size
    return PretrainData(
        config,
        blends,
        builder.build(blends.train, num_train, Split.train),
        builder.build(blends.validation, num_validation, Split.valid),
        _validation_by_source(config, blends, builder),
    )


def _validation_by_source(
    config: RunConfig, blends: Blends, builder: SampleDatasetBuilder
) -> dict[str, tuple[SampleDataset, int]]:
    """Return a dataset of each folder of a validation blend, and its share of the batches, at least one."""
    if len(blends.validation) < 2:
        return {}
    total = sum(folder.weight for folder in blends.validation)
    datasets = []
    for folder in blends.validation:
        num_batches = max(1, round(config.validation.batches * folder.weight / total))
        num_samples = num_batches * config.training.global_batch_size
        datasets.append((builder.build((folder,), num_samples, Split.valid), num_batches))
    return dict(zip(distinct_names(folder.path.name for folder in blends.validation), datasets, strict=True))


def _collate(items: list[dict[str, torch.Tensor]], packing: tuple[int, int] | None) -> Batch:
    """Stack samples; with `packing` (eod, alignment), make the one sample a sequence of packed documents."""
    names = ("tokens", "labels", "loss_mask")
    tokens_BT, labels_BT, loss_mask_BT = (torch.stack([item[n] for item in items]) for n in names)
    if packing is None:
        return causal_batch(tokens_BT, labels_BT, loss_mask_BT)
    return packed_batch(tokens_BT, labels_BT, loss_mask_BT, *packing)


def _tokens(item: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([item["tokens"], item["labels"][-1:]]).numpy()


def _describe(blend: tuple[PreparedFolder, ...], num_samples: int, sequence_length: int) -> list[dict[str, Any]]:
    total = sum(folder.weight for folder in blend)
    descriptions = []
    for folder in blend:
        share = folder.weight / total
        samples_per_epoch = (folder.manifest.num_tokens - 1) // sequence_length
        descriptions.append(
            {
                "path": str(folder.path),
                "share": share,
                "documents": folder.manifest.num_documents,
                "tokens": folder.manifest.num_tokens,
                "epochs": num_samples * share / samples_per_epoch,
                "documents_sha256": folder.manifest.documents_bin.sha256,
            }
        )
    return descriptions
