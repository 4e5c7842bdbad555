"""One checkpoint's tensors, read one by one: no model, no process groups, no megatron-core.

megatron-core writes torch's distributed checkpoint format: `.metadata` says which piece of which
tensor lies where in which file, and each piece is a small torch file of its own. Memory stays
bounded by the largest piece (`pieces`) or tensor (`whole`).
"""

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_q3n.config import UserError

OPTIMIZER = "optimizer."
_EMPTY_MIN, _EMPTY_MAX = float("inf"), float("-inf")


@dataclass(frozen=True)
class Entry:
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
        """Whether this is a master weight or a moment, not a weight of the model."""
        return self.name.startswith(OPTIMIZER)


@dataclass(frozen=True)
class Statistics:
    """What a glance at a tensor's values tells. `finite` is False if there is any inf or nan."""

    minimum: float
    maximum: float
    norm: float
    finite: bool


class Tensors:
    """The tensors of one checkpoint folder.

    Raises: UserError if `.metadata` is missing or unreadable.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Read `.metadata`."""
        self._folder = checkpoint
        try:
            metadata = FileSystemReader(checkpoint).read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise UserError(
                f"{checkpoint / '.metadata'} cannot be read ({error}); the checkpoint is damaged."
            ) from None
        self.entries = {
            name: Entry(name, tuple(found.size), found.properties.dtype)
            for name, found in sorted(metadata.state_dict_metadata.items())
            if isinstance(found, TensorStorageMetadata)
        }
        self._places: dict[str, list[tuple[Any, Any]]] = {}
        for index, place in metadata.storage_data.items():
            self._places.setdefault(index.fqn, []).append((index.offset, place))

    def pieces(self, name: str) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """Yield a tensor's pieces as they were saved, each with its offset in the whole."""
        for offset, place in self._places[name]:
            path = self._folder / place.relative_path
            try:
                with path.open("rb") as file:
                    file.seek(place.offset)
                    piece = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
            except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
                raise UserError(f"{path} cannot be read at {name} ({error}); run again with --verify.") from None
            yield tuple(offset or (0,) * piece.dim()), piece

    def whole(self, name: str) -> torch.Tensor:
        """Return one tensor, put together from its pieces."""
        entry = self.entries[name]
        full = torch.empty(entry.shape, dtype=entry.dtype)
        for offset, piece in self.pieces(name):
            full[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape))] = piece
        return full

    def statistics(self, name: str) -> Statistics:
        """Return minimum, maximum and Euclidean norm of a tensor, piece by piece."""
        low, high, squares, finite = _EMPTY_MIN, _EMPTY_MAX, 0.0, True
        for _, piece in self.pieces(name):
            if piece.numel():
                values = piece.double()
                low, high = min(low, values.min().item()), max(high, values.max().item())
                squares += values.square().sum().item()
                finite = finite and bool(values.isfinite().all())
        return Statistics(low, high, squares**0.5, finite)
