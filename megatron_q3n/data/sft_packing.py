"""Sequence packing of conversations for SFT: best-fit-decreasing bins and document boundaries.

No conversation attends to another, and each is packed once; every epoch is a permutation of the packed sequences. So
the sequences of a step are a function of the step, as in pretraining.

Position p of a sequence predicts the next token, so a conversation of n tokens takes n - 1 positions.
"""

import bisect
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from megatron_q3n.data.batch import Batch
from megatron_q3n.data.conversations import TokenizedConversation
from megatron_q3n.data.source_weights import repeated
from megatron_q3n.data.tokenized_conversations import TokenizedConversations
from megatron_q3n.packing import Packing


class PackedConversations:
    """Packed sequences of a set of conversations, repeated without end, each epoch in its own order."""

    def __init__(
        self,
        conversations: TokenizedConversations,
        length: int,
        alignment: int,
        seed: int,
        eod: int,
        source_weights: Sequence[float] | None = None,
    ) -> None:
        members = list(range(len(conversations))) if source_weights is None else _members(conversations, source_weights)
        lengths = np.diff(conversations.bounds)[members].tolist()
        bins = best_fit_decreasing([_aligned_length(n, alignment) for n in lengths], length)
        self.bins = [[members[position] for position in positions] for positions in bins]
        self._conversations, self._length, self._alignment = conversations, length, alignment
        self._seed, self._eod = seed, eod
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Return the number of sequences of one epoch."""
        return len(self.bins)

    def batch(self, index: int) -> Batch:
        """Return sequence `index` of the endless run of epochs as a micro-batch."""
        epoch, offset = divmod(index, len(self.bins))
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng((self._seed, epoch))
            self._order = (epoch, generator.permutation(len(self.bins)))
        members = self.bins[int(self._order[1][offset])]
        return pack([self._conversations[i] for i in members], self._length, self._alignment, self._eod)


def _members(conversations: TokenizedConversations, source_weights: Sequence[float]) -> list[int]:
    """Return the indices of the conversations of one epoch, given the weight of each source."""
    weights = dict(zip(conversations.source_names, source_weights, strict=True))
    by_source = conversations.indices_by_source()
    return [index for name, indices in by_source.items() for index in repeated(indices, weights[name], name)]


def best_fit_decreasing(sizes: list[int], capacity: int) -> list[list[int]]:
    """Assign items to bins by best-fit decreasing bin packing; returns the indices of the items in each bin."""
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    # (remaining capacity, bin), ascending
    remaining: list[tuple[int, int]] = []
    bins: list[list[int]] = []
    for index in order:
        assert 0 < sizes[index] <= capacity, (sizes[index], capacity)
        position = bisect.bisect_left(remaining, (sizes[index], 0))
        if position < len(remaining):
            left, chosen = remaining.pop(position)
        else:
            left, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if left > sizes[index]:
            bisect.insort(remaining, (left - sizes[index], chosen))
    return bins


def pack(items: list[TokenizedConversation], length: int, alignment: int, eod: int) -> Batch:
    """Return one packed sequence of conversations; the rest is padding without loss.

    Shapes: (1, length) each; the packing has one document per conversation, and one for the padding.
    """
    tokens, labels = (np.full(length, eod, np.int64) for _ in range(2))
    weights, positions = np.zeros(length, np.float32), np.zeros(length, np.int64)
    bounds, used_lengths = [0], []
    for item in items:
        start, used = bounds[-1], len(item.tokens) - 1
        tokens[start : start + used] = item.tokens[:-1]
        labels[start : start + used] = item.tokens[1:]
        weights[start : start + used] = item.weights[1:]
        bounds.append(start + _aligned_length(used + 1, alignment))
        used_lengths.append(used)
    if bounds[-1] < length:
        bounds.append(length)
        used_lengths.append(0)
    for start, end in itertools.pairwise(bounds):
        positions[start:end] = np.arange(end - start)
    columns = (tokens, labels, weights, positions)
    tokens_BT, labels_BT, weights_BT, positions_BT = (torch.from_numpy(x)[None] for x in columns)
    return Batch(tokens_BT, labels_BT, weights_BT, positions_BT, packing=Packing.of(bounds, used_lengths=used_lengths))


def _aligned_length(num_tokens: int, alignment: int) -> int:
    """Return the positions of a conversation of `num_tokens`, rounded up to a multiple of the alignment."""
    return -(-(num_tokens - 1) // alignment) * alignment
