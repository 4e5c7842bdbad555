"""Tally: a table of sums and maxima that every rank fills in part, completed by two all-reduces.

A mean is a (sum, count) pair, so values that are equal on several ranks are counted repeatedly in both, and the mean is
correct. Maxima are of magnitudes; 0 is the neutral value.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


class Tally:
    """Named tensors on the device: views of one float64 buffer for sums and of one for maxima."""

    def __init__(self, sums: Shapes, maxima: Shapes) -> None:
        self._sums, self.sums = _views(sums)
        self._maxima, self.maxima = _views(maxima)

    def add(self, name: str, row: int, total: Tensor, count: int) -> None:
        """Add a sum and the number of its terms; `sums[name]` is [rows, 2]."""
        self.sums[name][row, 0] += total
        self.sums[name][row, 1] += count

    def update_max(self, name: str, row: int, value: Tensor) -> None:
        """Update the largest magnitude of a row."""
        entry = self.maxima[name][row]
        torch.maximum(entry, value.double(), out=entry)

    def clear(self) -> None:
        """Set all sums and maxima to 0."""
        self._sums.zero_()
        self._maxima.zero_()

    def all_reduce(self, world_size: int) -> None:
        """Reduce the table over all ranks. A collective call."""
        if world_size > 1:
            torch.distributed.all_reduce(self._sums)
            torch.distributed.all_reduce(self._maxima, op=torch.distributed.ReduceOp.MAX)

    def means(self, name: str) -> dict[int, Any]:
        """Return sum / count of every row with a count. Synchronizes with the device."""
        pairs = self.sums[name]
        means, counts = ((pairs[..., 0] / pairs[..., 1]).tolist(), pairs[..., 1].reshape(len(pairs), -1).amax(1))
        return {row: means[row] for row, count in enumerate(counts.tolist()) if count}


def _views(shapes: Shapes) -> tuple[Tensor, dict[str, Tensor]]:
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    buffer = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=torch.cuda.current_device())
    parts = buffer.split(list(sizes.values()))
    return buffer, {name: part.view(shapes[name]) for name, part in zip(shapes, parts)}
