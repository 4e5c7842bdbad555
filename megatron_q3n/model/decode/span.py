"""Token spans: the new tokens of one decode pass, and their positions in their sequences.

Index arithmetic only; forward.py runs the layers. Where the positions are known on the device only, there is no host
synchronization and every shape is fixed, so that a pass can be captured as a CUDA graph.

Shapes: N sequences, T new tokens of each, S all new tokens, L positions, H key/value heads, C capacity.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from megatron_q3n.packing import Packing

# new tokens per sequence: decoding, and draft tokens to verify
_SHORT = 16


@dataclass
class Span:
    """New tokens of one pass: `counts[n]` tokens of sequence n, after its `starts[n]` earlier ones.

    With `start_N` the device holds the numbers of earlier tokens, and `starts` are upper bounds; the counts are then
    equal, and the tensor must not change while the span is in use. Tokens come flat, sequence by sequence. If all
    counts are equal the layers see a batch [T,N], otherwise one packed row [S,1].
    """

    starts: list[int]
    counts: list[int]
    device: torch.device
    start_N: Tensor | None = None

    def __post_init__(self) -> None:
        assert len(self.starts) == len(self.counts) > 0
        assert min(self.counts) > 0
        self.is_batch = len(set(self.counts)) == 1
        assert self.is_batch or self.start_N is None
        # bounds of the sequences in a packed row [N+1]; None for a batch
        self.packing = None if self.is_batch else Packing.of([0, *accumulate(self.counts)], self.device)
        self._slot_mappings: dict[tuple[int, int], Tensor] = {}

    @classmethod
    def from_device_starts(cls, start_N: Tensor, count: int, max_end: int) -> "Span":
        """Return `count` tokens of each sequence at positions held on the device, all below `max_end`."""
        rows = len(start_N)
        return cls([max_end - count] * rows, [count] * rows, start_N.device, start_N)

    @property
    def is_short(self) -> bool:
        """Whether every sequence has the same small number of tokens: decoding, or draft tokens to verify."""
        return self.is_batch and self.counts[0] <= _SHORT

    @property
    def is_one_each(self) -> bool:
        """Whether each sequence has one token."""
        return self.is_batch and self.counts[0] == 1

    @property
    def ends(self) -> list[int]:
        """Tokens of each sequence after the pass, or their upper bounds."""
        return [start + count for start, count in zip(self.starts, self.counts)]

    @property
    def single_start(self) -> int | None:
        """Start position of a single sequence; None for several, or where only the device holds it."""
        return self.starts[0] if len(self.starts) == 1 and self.start_N is None else None

    @cached_property
    def position_S(self) -> Tensor:
        """Each token's position in its sequence."""
        if self.start_N is not None:
            if self.counts[0] == 1:
                return self.start_N
            steps = torch.arange(self.counts[0], device=self.device)
            return (self.start_N[:, None] + steps).flatten()
        positions = [start + i for start, count in zip(self.starts, self.counts) for i in range(count)]
        return torch.tensor(positions).to(self.device, non_blocking=True)

    def slot_mapping(self, heads: int, capacity: int) -> Tensor:
        """Return the index of each token's heads in a flattened cache [N,H,C], [S·H]; computed once for all layers."""
        if (heads, capacity) not in self._slot_mappings:
            rows, row_size = len(self.counts), heads * capacity
            offset_NH = torch.arange(0, rows * row_size, capacity, device=self.device).view(rows, heads)
            if self.is_batch:
                offset_SH = offset_NH[:, None].expand(-1, self.counts[0], -1).reshape(-1, heads)
            else:
                row_S = [row for row, count in enumerate(self.counts) for _ in range(count)]
                offset_SH = offset_NH[torch.tensor(row_S).to(self.device, non_blocking=True)]
            self._slot_mappings[heads, capacity] = (offset_SH + self.position_S[:, None]).flatten()
        return self._slot_mappings[heads, capacity]

    @cached_property
    def future_NTL(self) -> Tensor:
        """Mask of the positions after each token of a batch: True where attention is not allowed."""
        position_NT = self.position_S.view(len(self.counts), self.counts[0])
        return torch.arange(max(self.ends), device=self.device) > position_NT[..., None]

    def outside_window_NTL(self, window: int) -> Tensor:
        """Return the mask of positions after each token of a batch, or before its sliding window."""
        position_NT = self.position_S.view(len(self.counts), self.counts[0])
        positions_L = torch.arange(max(self.ends), device=self.device)
        return self.future_NTL | (positions_L <= position_NT[..., None] - window)

    def arrange(self, flat_S: Tensor) -> Tensor:
        """Reshape flat tokens [S,…] into the layers' layout: [T,N,…] for a batch, [S,1,…] otherwise."""
        if not self.is_batch:
            return flat_S.unsqueeze(1)
        return flat_S.unflatten(0, (len(self.counts), self.counts[0])).transpose(0, 1)

    def flatten(self, arranged: Tensor) -> Tensor:
        """Undo `arrange`."""
        if not self.is_batch:
            return arranged.squeeze(1)
        return arranged.transpose(0, 1).flatten(0, 1)
