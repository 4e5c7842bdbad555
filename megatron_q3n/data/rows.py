"""Rows of sequence_length + 1 tokens out of prepared folders: megatron-core's datasets, made repeatable.

GPTDataset lays shuffled documents end to end and cuts rows; BlendedDataset draws from several folders by
weight. Two things differ from megatron-core's own builder:

* Row i depends on the folder, the seed and the sequence length, and not on how many rows the run will ask
  for. (The builder shuffles all epochs together, so that a longer run would reorder what a shorter one
  saw.) Each epoch here is the one packing in an order of its own, and every row comes once before any
  comes twice.
* Index files are looked up by the content they index and appear complete or not at all; the builder looks
  them up by path and writes them in place, so that data made anew, or a killed run, would leave a wrong one.
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
from megatron_q3n.data.blend import Part
from megatron_q3n.data.folders import publish
from megatron_q3n.data.manifest import DOCUMENTS
from megatron_q3n.data.tokenizer import TextTokenizer


class EpochRows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The rows of one folder, as many times over as asked for."""

    def __init__(self, rows: GPTDataset, seed: int, num_rows: int) -> None:
        self.rows = rows
        self.seed = seed
        self.num_rows = num_rows
        self._order: tuple[int, np.ndarray] = (0, np.empty(0, dtype=np.int64))
        # what BlendedDataset reads of the datasets it blends
        self.index_split = rows.index_split
        self.unique_identifiers = OrderedDict(rows.unique_identifiers, **{"class": "EpochRows"})

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(int(index), len(self.rows))
        return self.rows[self._order_of(epoch)[place] if epoch else place]

    def _order_of(self, epoch: int) -> np.ndarray:
        """Return the order of a later epoch; the first is GPTDataset's own."""
        if self._order[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._order = (epoch, generator.permutation(len(self.rows)))
        return self._order[1]


type Rows = EpochRows | BlendedDataset


class RowSource:
    """Where rows are read from: a cache of indices, a sequence length, a seed and a tokenizer."""

    def __init__(
        self, cache: Path, sequence_length: int, seed: int, tokenizer: TextTokenizer, may_build: bool = True
    ) -> None:
        self.cache = cache
        self.sequence_length = sequence_length
        self.seed = seed
        self.tokenizer = tokenizer
        self.may_build = may_build

    def rows(self, parts: Sequence[Part], num_rows: int, split: Split) -> Rows:
        """Return at least `num_rows` rows of a blend.

        With torch.distributed initialised only global rank 0 can build indices (a rule inside megatron-core);
        the others need `may_build=False` and a barrier after rank 0 is done.
        """
        datasets = [self._folder_rows(part, num_rows, split) for part in parts]
        if len(parts) == 1:
            return datasets[0]
        total = sum(part.weight for part in parts)
        weights = [part.weight / total for part in parts]
        contents = [part.manifest.documents_bin.sha256 for part in parts]
        identity = [[rows.unique_identifiers for rows in datasets], contents, weights, num_rows]

        def blend(path_to_cache: Path) -> BlendedDataset:
            return BlendedDataset(datasets, weights, num_rows, self._config(parts[0], path_to_cache))

        return self._indexed({"blend": identity}, blend)

    def held_out_rows(self, part: Part, num_rows: int) -> Rows:
        """Return at least `num_rows` rows of one folder, to evaluate on; they repeat once all have come."""
        return self.rows((part,), num_rows, Split.valid)

    def _folder_rows(self, part: Part, num_rows: int, split: Split) -> EpochRows:
        prefix = str(part.path / DOCUMENTS)

        def index(path_to_cache: Path) -> GPTDataset:
            config = self._config(part, path_to_cache)
            documents = GPTDataset.build_low_level_dataset(prefix, config)
            every = np.arange(GPTDataset.numel_low_level_dataset(documents), dtype=np.int32)
            with warnings.catch_warnings():  # pad is eod; rows are full, so there is nothing to pad
                warnings.filterwarnings("ignore", message="The pad token id in the tokenizer")
                return GPTDataset(documents, prefix, every, None, split, config)

        return EpochRows(self._indexed({"folder": self._identity(part, split)}, index), self.seed, num_rows)

    def _identity(self, part: Part, split: Split) -> list[Any]:
        files = [record.sha256 for record in part.manifest.files.values()]
        return [str(part.path), files, self.sequence_length, self.seed, split.name]

    def _config(self, part: Part, path_to_cache: Path) -> GPTDatasetConfig:
        return GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.sequence_length,
            # without any blend the configuration would mean mock data
            blend_per_split=[([str(part.path / DOCUMENTS)], None), None, None],
            path_to_cache=str(path_to_cache),
            tokenizer=self.tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )

    def _indexed[Indexed](self, identity: dict[str, Any], build: Callable[[Path], Indexed]) -> Indexed:
        """Load what `build(path_to_cache)` caches, having it built first where it is not there."""
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
