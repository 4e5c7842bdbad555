"""Packing: documents of one packed row, made once per batch: offsets on host and device, and derived tensors.

A packed row holds several documents one after the other. They do not attend to each other, and every recurrence starts
anew at each. Kernels take `cu_seqlens` on the device; sizes, loops and error messages use `offsets` on the host, so
that nothing copies from the device. Derived tensors are made on first use and kept with the object.

Shapes: T tokens of the row, D documents, n context-parallel ranks, S = T / n tokens of a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Documents of one row. `offsets` [D+1] from 0 to T on the host; `cu_seqlens` the same, int32 on a device.

    `used_lengths` [D] are the lengths without the padding at the end of each document; None if there is no padding.
    """

    offsets: tuple[int, ...]
    cu_seqlens: Tensor
    used_lengths: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls, offsets: Sequence[int], device: torch.device | str = "cpu", used_lengths: Sequence[int] | None = None
    ) -> "Packing":
        """Make it from offsets on the host; the copy to a GPU does not block.

        Raises: ValueError if the offsets do not rise from 0, or a document uses more than its length.
        """
        bounds = tuple(int(offset) for offset in offsets)
        if len(bounds) < 2 or bounds[0] != 0 or any(end < start for start, end in pairwise(bounds)):
            raise ValueError(f"offsets of packed documents must rise from 0, found {bounds[:8]}")
        lengths = tuple(end - start for start, end in pairwise(bounds))
        used = lengths if used_lengths is None else tuple(int(length) for length in used_lengths)
        if len(used) != len(lengths) or any(not 0 <= part <= whole for part, whole in zip(used, lengths)):
            raise ValueError(f"documents of {lengths[:8]} tokens cannot use {used[:8]} of them")
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True)
        return cls(bounds, cu_seqlens, None if used == lengths else used)

    def to(self, device: torch.device | str) -> "Packing":
        """Return the packing with its device tensors on another device."""
        return Packing(self.offsets, self.cu_seqlens.to(device, non_blocking=True), self.used_lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return self.offsets[-1]

    @property
    def num_used_tokens(self) -> int:
        """Tokens of the row that are not padding."""
        return self.num_tokens if self.used_lengths is None else sum(self.used_lengths)

    @property
    def num_documents(self) -> int:
        """Documents of the row, empty ones included."""
        return len(self.offsets) - 1

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Start and end of every document."""
        return tuple(pairwise(self.offsets))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every document."""
        return tuple(end - start for start, end in self.spans)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @cached_property
    def cu_seqlens_long(self) -> Tensor:
        """`cu_seqlens` in int64: one tensor, by whose identity the delta rule's kernels keep what they derive from it.

        They derive it on the host, which waits for the device; a new tensor per call would make it wait in every layer.
        """
        return self.cu_seqlens.long()

    @cached_property
    def document_T(self) -> Tensor:
        """Number of the document that each token belongs to, int64 on the device."""
        lengths = torch.tensor(self.lengths)
        return torch.repeat_interleave(torch.arange(self.num_documents), lengths).to(
            self.cu_seqlens.device, non_blocking=True
        )

    @cached_property
    def position_T(self) -> Tensor:
        """Position of each token in its document, int32 on the device."""
        starts_T = torch.repeat_interleave(torch.tensor(self.offsets[:-1]), torch.tensor(self.lengths))
        positions = torch.arange(self.num_tokens) - starts_T
        return positions.to(torch.int32).to(self.cu_seqlens.device, non_blocking=True)

    def zigzag(self, size: int) -> Tensor:
        """Return which tokens of the row each of `size` context-parallel ranks holds, in its own order.

        Every document is cut into 2·size equal chunks; rank r holds chunks r and 2·size-1-r, so that causal attention
        costs every rank the same (megatron-core's and TransformerEngine's order).
        Shapes: int64 [size, S] on the host.
        Raises: ValueError if a document's length is not a multiple of 2·size.
        """
        if size not in self._zigzag:
            self._zigzag[size] = _zigzag(self.spans, size)
        return self._zigzag[size]

    def padding_mask(self, size: int, rank: int) -> Tensor | None:
        """Return which tokens of a context-parallel rank are padding, in its own order; None without padding.

        Shapes: bool [S] on the device.
        """
        if self.used_lengths is None:
            return None
        if (size, rank) not in self._padding_masks:
            ends = torch.tensor(self.used_lengths)
            documents_T = torch.repeat_interleave(torch.arange(self.num_documents), torch.tensor(self.lengths))
            starts_T = torch.tensor(self.offsets[:-1])[documents_T]
            mask_T = torch.arange(self.num_tokens) - starts_T >= ends[documents_T]
            mask_S = mask_T if size == 1 else mask_T[self.zigzag(size)[rank]]
            self._padding_masks[size, rank] = mask_S.to(self.cu_seqlens.device, non_blocking=True)
        return self._padding_masks[size, rank]

    @cached_property
    def _padding_masks(self) -> dict[tuple[int, int], Tensor]:
        return {}

    @cached_property
    def _zigzag(self) -> dict[int, Tensor]:
        return {}

    def chunks_of_rank(self, size: int) -> "Packing":
        """Return the chunks of one of `size` context-parallel ranks in its own order as documents, two per document."""
        offsets = [0]
        for length in self.lengths:
            offsets += [offsets[-1] + length // (2 * size), offsets[-1] + 2 * (length // (2 * size))]
        return Packing.of(offsets, self.cu_seqlens.device)


def _zigzag(spans: Sequence[tuple[int, int]], size: int) -> Tensor:
    by_rank: list[list[Tensor]] = [[] for _ in range(size)]
    for start, end in spans:
        if (end - start) % (2 * size):
            raise ValueError(
                f"a document of {end - start} tokens cannot be cut into 2 × {size} equal chunks; "
                f"set data.document_alignment to a multiple of {2 * size}"
            )
        chunks = torch.arange(start, end).view(2 * size, -1)
        for rank in range(size):
            by_rank[rank] += [chunks[rank], chunks[2 * size - 1 - rank]]
    return torch.stack([torch.cat(parts) for parts in by_rank])
