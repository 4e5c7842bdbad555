"""Tensors of a checkpoint, read one by one: no model, no process groups, no megatron-core.

megatron-core writes torch's distributed checkpoint format: `.metadata` holds the file and offset of every chunk of
every tensor, and each chunk is a small torch file. Memory is bounded by the largest chunk (`chunks`) or tensor
(`read`).
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_q3n.checkpoint.metadata_file import DAMAGE_ERRORS, read_metadata
from megatron_q3n.config import UserError

OPTIMIZER = "optimizer."
_EMPTY_MIN, _EMPTY_MAX = float("inf"), float("-inf")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint as `.metadata` describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the elements alone."""
        return self.numel * self.dtype.itemsize

    @property
    def is_optimizer(self) -> bool:
        """Whether this is an optimizer state (master weight or moment), not a weight of the model."""
        return self.name.startswith(OPTIMIZER)


@dataclass(frozen=True)
class Statistics:
    """Statistics of a tensor's values. `finite` is False if any value is inf or nan."""

    minimum: float
    maximum: float
    norm: float
    finite: bool


class CheckpointTensors:
    """The tensors of one checkpoint folder.

    Raises: UserError if `.metadata` is missing or unreadable.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Read `.metadata`."""
        self._folder = checkpoint
        metadata = read_metadata(checkpoint)
        self.entries = {
            name: TensorEntry(name, tuple(entry.size), entry.properties.dtype)
            for name, entry in sorted(metadata.state_dict_metadata.items())
            if isinstance(entry, TensorStorageMetadata)
        }
        self._storage: dict[str, list[tuple[Any, Any]]] = {}
        for index, location in metadata.storage_data.items():
            self._storage.setdefault(index.fqn, []).append((index.offset, location))

    def chunks(self, name: str) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """Yield a tensor's chunks as they were saved, each with its offset in the global tensor."""
        for offset, location in self._storage[name]:
            path = self._folder / location.relative_path
            try:
                with path.open("rb") as file:
                    file.seek(location.offset)
                    chunk = torch.load(io.BytesIO(file.read(location.length)), weights_only=True)
            except (OSError, *DAMAGE_ERRORS) as error:
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(f"{path} cannot be read at {name} ({text}); run again with --verify.") from None
            if not isinstance(chunk, torch.Tensor) or chunk.dtype is not self.entries[name].dtype:
                raise UserError(f"{path} does not hold {name} where .metadata has it; use another checkpoint.")
            yield tuple(offset or (0,) * chunk.dim()), chunk

    def read(self, name: str) -> torch.Tensor:
        """Return one global tensor, assembled from its chunks."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        for offset, chunk in self.chunks(name):
            tensor[tuple(slice(o, o + n) for o, n in zip(offset, chunk.shape))] = chunk
        return tensor

    def statistics(self, name: str) -> Statistics:
        """Return minimum, maximum and Euclidean norm of a tensor, computed chunk by chunk."""
        low, high, squares, finite = _EMPTY_MIN, _EMPTY_MAX, 0.0, True
        for _, chunk in self.chunks(name):
            if chunk.numel():
                values = chunk.double()
                low, high = min(low, values.min().item()), max(high, values.max().item())
                squares += values.square().sum().item()
                finite = finite and bool(values.isfinite().all())
        return Statistics(low, high, squares**0.5, finite)
