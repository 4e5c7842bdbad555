"""Pretraining samples of sequence_length + 1 tokens: megatron-core's GPTDataset and BlendedDataset, made repeatable.

GPTDataset concatenates shuffled documents and cuts them into samples; BlendedDataset samples several folders by weight.
Two things differ from megatron-core's own builder:

* Sample i depends on the folder, the seed and the sequence length, and not on the number of samples in the run. (The
  builder shuffles all epochs together, so that a longer run would reorder the samples of a shorter one.) Here the
  samples are cut once; each epoch is a permutation of them, and every sample comes once before any comes twice.
* Index files are looked up by a hash of the content they index, and a cached index is complete or absent. The builder
  looks them up by path and writes them in place, so that data prepared again, or a killed run, would leave a wrong one.
"""

import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_q3n.config import UserError
from megatron_q3n.data.blend import PreparedFolder
from megatron_q3n.data.folders import publish
from megatron_q3n.data.manifest import DOCUMENTS
from megatron_q3n.data.tokenizer import TextTokenizer


class EpochDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Samples of one prepared folder, repeated for as many epochs as `num_samples` needs."""

    def __init__(self, samples: GPTDataset, seed: int, num_samples: int) -> None:
        self.samples = samples
        self.seed = seed
        self.num_samples = num_samples
        self._order: tuple[int, np.ndarray] = (0, np.empty(0, dtype=np.int64))
        # attributes that BlendedDataset reads of the datasets it blends
        self.index_split = samples.index_split
        self.unique_identifiers = OrderedDict(samples.unique_identifiers, **{"class": "EpochDataset"})

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, offset = divmod(int(index), len(self.samples))
        return self.samples[self._permutation(epoch)[offset] if epoch else offset]

    def _permutation(self, epoch: int) -> np.ndarray:
        """Return the sample order of a later epoch; the first epoch has GPTDataset's own shuffle."""
        if self._order[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._order = (epoch, generator.permutation(len(self.samples)))
        return self._order[1]


type SampleDataset = EpochDataset | BlendedDataset


class SampleDatasetBuilder:
    """Builder of sample datasets over a cache of index files, for one sequence length, seed and tokenizer."""

    def __init__(
        self, cache: Path, sequence_length: int, seed: int, tokenizer: TextTokenizer, may_build: bool = True
    ) -> None:
        self.cache = cache
        self.sequence_length = sequence_length
        self.seed = seed
        self.tokenizer = tokenizer
        self.may_build = may_build

    def build(self, blend: Sequence[PreparedFolder], num_samples: int, split: Split) -> SampleDataset:
        """Return a dataset of at least `num_samples` samples of a blend.

        With torch.distributed initialized only global rank 0 can build indices (a rule inside megatron-core); the
        other ranks need `may_build=False` and a barrier after rank 0 has finished.

        Raises: UserError if the index may not be built here and is not in the cache.
        """
        datasets = [self._folder_dataset(folder, num_samples, split) for folder in blend]
        if len(blend) == 1:
            return datasets[0]
        total = sum(folder.weight for folder in blend)
        weights = [folder.weight / total for folder in blend]
        contents = [folder.manifest.documents_bin.sha256 for folder in blend]
        identity = [[dataset.unique_identifiers for dataset in datasets], contents, weights, num_samples]

        def build_blend(path_to_cache: Path) -> BlendedDataset:
            return BlendedDataset(datasets, weights, num_samples, self._config(blend[0], path_to_cache))

        return self._cached({"blend": identity}, build_blend)

    def build_held_out(self, folder: PreparedFolder, num_samples: int) -> SampleDataset:
        """Return at least `num_samples` samples of one folder, for evaluation; they repeat after one epoch."""
        return self.build((folder,), num_samples, Split.valid)

    def _folder_dataset(self, folder: PreparedFolder, num_samples: int, split: Split) -> EpochDataset:
        prefix = str(folder.path / DOCUMENTS)

        def build_index(path_to_cache: Path) -> GPTDataset:
            config = self._config(folder, path_to_cache)
            documents = GPTDataset.build_low_level_dataset(prefix, config)
            indices = np.arange(GPTDataset.numel_low_level_dataset(documents), dtype=np.int32)
            # the pad id is the eod id, which megatron-core warns about; samples are full, so nothing is padded
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The pad token id in the tokenizer")
                return GPTDataset(documents, prefix, indices, None, split, config)

        samples = self._cached({"folder": self._identity(folder, split)}, build_index)
        return EpochDataset(samples, self.seed, num_samples)

    def _identity(self, folder: PreparedFolder, split: Split) -> list[Any]:
        files = [record.sha256 for record in folder.manifest.files.values()]
        return [str(folder.path), files, self.sequence_length, self.seed, split.name]

    def _config(self, folder: PreparedFolder, path_to_cache: Path) -> GPTDatasetConfig:
        return GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.sequence_length,
            # without any blend the configuration would mean mock data
            blend_per_split=[([str(folder.path / DOCUMENTS)], None), None, None],
            path_to_cache=str(path_to_cache),
            tokenizer=self.tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )

    def _cached[Dataset](self, identity: dict[str, Any], build: Callable[[Path], Dataset]) -> Dataset:
        """Return the dataset that `build(path_to_cache)` loads, building its index files first if they are absent."""
        versioned = identity | {"megatron-core": version("megatron-core")}
        text = json.dumps(versioned, default=lambda item: item.unique_identifiers)
        folder = self.cache / "indices" / hashlib.sha256(text.encode("utf-8")).hexdigest()[:24]
        if not folder.is_dir():
            if not self.may_build:
                raise UserError(
                    f"{folder}: the first process built this index, and this process does not see it. Put "
                    "data.cache_dir (or $Q3N_CACHE) on a file system that all nodes share."
                )
            with publish(folder, setting="data.cache_dir") as temporary:
                build(temporary)
        return build(folder)
