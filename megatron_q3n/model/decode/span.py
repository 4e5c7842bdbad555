"""Which new tokens one call of the model brings, and where in their sequences they stand.

No arithmetic on activations here: `forward.py` runs the layers. Where positions come from the device,
nothing here waits for it and every shape is fixed, so that a pass may be captured as a CUDA graph.

Shapes: N sequences, T new tokens of each, S all new tokens, L positions, H key/value heads, C capacity.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_SHORT = 16  # new tokens per sequence: decoding, and drafts to verify


@dataclass
class Span:
    """The new tokens of one call: `counts[n]` of them for sequence n, which has `starts[n]` before.

    Where `start_N` is given, the device alone knows how many stand before, and `starts` only says how
    many at most; the counts are then equal, and the tensor stays as it is while the span is in use.
    Tokens come flat and sequence by sequence. Where all counts are equal the layers see a batch [T,N];
    else one packed row [S,1].
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
        self.cu_seqlens = None if self.is_batch else self._bounds()
        self._slots: dict[tuple[int, int], Tensor] = {}

    @classmethod
    def at(cls, start_N: Tensor, count: int, reach: int) -> "Span":
        """Return `count` tokens of each sequence from positions that the device knows, all below `reach`."""
        rows = len(start_N)
        return cls([reach - count] * rows, [count] * rows, start_N.device, start_N)

    @property
    def is_short(self) -> bool:
        """Whether each sequence has the same few tokens: decoding, or drafts to verify."""
        return self.is_batch and self.counts[0] <= _SHORT

    @property
    def is_one_each(self) -> bool:
        """Whether each sequence has one token."""
        return self.is_batch and self.counts[0] == 1

    @property
    def ends(self) -> list[int]:
        """Tokens of each sequence after the call, or the most there can be."""
        return [start + count for start, count in zip(self.starts, self.counts)]

    @property
    def only_start(self) -> int | None:
        """Where the tokens of a single sequence begin, if the host knows it."""
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

    def slots(self, heads: int, capacity: int) -> Tensor:
        """Return where each token's heads lie in a cache of [N,H,C] places, [S·H]; made once for all layers."""
        if (heads, capacity) not in self._slots:
            rows, size = len(self.counts), heads * capacity
            begin_NH = torch.arange(0, rows * size, capacity, device=self.device).view(rows, heads)
            if self.is_batch:
                begin_SH = begin_NH[:, None].expand(-1, self.counts[0], -1).reshape(-1, heads)
            else:
                row_S = [row for row, count in enumerate(self.counts) for _ in range(count)]
                begin_SH = begin_NH[torch.tensor(row_S).to(self.device, non_blocking=True)]
            self._slots[heads, capacity] = (begin_SH + self.position_S[:, None]).flatten()
        return self._slots[heads, capacity]

    @cached_property
    def future_NTL(self) -> Tensor:
        """Which positions come after each token of a batch, and so are hidden from it."""
        position_NT = self.position_S.view(len(self.counts), self.counts[0])
        return torch.arange(max(self.ends), device=self.device) > position_NT[..., None]

    def outside_NTL(self, window: int) -> Tensor:
        """Which positions come after each token of a batch, or so long before that a window ends."""
        position_NT = self.position_S.view(len(self.counts), self.counts[0])
        positions_L = torch.arange(max(self.ends), device=self.device)
        return self.future_NTL | (positions_L <= position_NT[..., None] - window)

    def _bounds(self) -> Tensor:
        bounds = torch.tensor([0, *self.counts]).cumsum(0)
        return bounds.to(torch.int32).to(self.device, non_blocking=True)

    def arrange(self, flat_S: Tensor) -> Tensor:
        """Turn what is flat, [S,…], into the layers' order, [T,N,…] or [S,1,…]."""
        if not self.is_batch:
            return flat_S.unsqueeze(1)
        return flat_S.unflatten(0, (len(self.counts), self.counts[0])).transpose(0, 1)

    def flatten(self, arranged: Tensor) -> Tensor:
        """Undo `arrange`."""
        if not self.is_batch:
            return arranged.squeeze(1)
        return arranged.transpose(0, 1).flatten(0, 1)
