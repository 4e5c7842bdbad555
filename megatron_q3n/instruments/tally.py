"""A table of sums and maxima that every rank fills in part, and that two all-reduces make everybody's.

Means are (sum, count) pairs: what several ranks hold alike then counts twice in both, and the mean stays right.
Maxima are of magnitudes, so 0 says nothing.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


class Tally:
    """Named tensors, views of one float64 buffer each for sums and maxima, which stay on the device."""

    def __init__(self, sums: Shapes, maxima: Shapes) -> None:
        self._sums, self.sums = _views(sums)
        self._maxima, self.maxima = _views(maxima)

    def add(self, name: str, place: int, total: Tensor, count: int) -> None:
        """Add a sum and the number of its terms; `sums[name]` is [places, 2]."""
        self.sums[name][place, 0] += total
        self.sums[name][place, 1] += count

    def raise_to(self, name: str, place: int, value: Tensor) -> None:
        """Keep the largest magnitude seen at a place."""
        entry = self.maxima[name][place]
        torch.maximum(entry, value.double(), out=entry)

    def clear(self) -> None:
        """Begin anew."""
        self._sums.zero_()
        self._maxima.zero_()

    def share(self, world_size: int) -> None:
        """Make every rank's table the whole run's. A collective call."""
        if world_size > 1:
            torch.distributed.all_reduce(self._sums)
            torch.distributed.all_reduce(self._maxima, op=torch.distributed.ReduceOp.MAX)

    def means(self, name: str) -> dict[int, Any]:
        """Return sum over count of every place where something was counted. Waits for the device."""
        pairs = self.sums[name]
        means, counts = ((pairs[..., 0] / pairs[..., 1]).tolist(), pairs[..., 1].reshape(len(pairs), -1).amax(1))
        return {place: means[place] for place, count in enumerate(counts.tolist()) if count}


def _views(shapes: Shapes) -> tuple[Tensor, dict[str, Tensor]]:
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    buffer = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=torch.cuda.current_device())
    parts = buffer.split(list(sizes.values()))
    return buffer, {name: part.view(shapes[name]) for name, part in zip(shapes, parts)}
