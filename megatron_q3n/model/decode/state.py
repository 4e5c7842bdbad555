"""What a batch of sequences carries from one call of the model to the next while text is generated.

A Gated DeltaNet layer carries a few inputs of its convolution and one matrix per head, however long
the sequence: its memory does not grow. A gated attention layer carries keys and values of every
token. Sequences are rows, they have lengths of their own, and rows may join and leave.

No arithmetic here: `forward.py` runs the layers, `attention.py` reads the keys and values.

Shapes: N sequences, S all new tokens, Hkv key/value heads of this rank, D head dim, C capacity,
K convolution taps.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from megatron_q3n.model.decode.span import Span
from megatron_q3n.model.gated_delta_net import GatedDeltaNet, GatedDeltaNetState

_CAPACITY_STEP = 64  # positions; a cache also grows by half, so that copies are rare


@dataclass
class KeyValueCache:
    """Keys (RoPE applied) and values of one attention layer. Shapes: [N,Hkv,C,D] each.

    What stands beyond a sequence's length is never read, so a token is taken back by shortening.
    """

    key: Tensor
    value: Tensor

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self.key.shape[2]

    def write(self, key_SHD: Tensor, value_SHD: Tensor, span: Span) -> None:
        """Put the new tokens' keys and values at their positions."""
        self.reserve(max(span.ends))
        for stored, new in ((self.key, key_SHD), (self.value, value_SHD)):
            if span.only_start is not None:  # a plain copy needs no index
                stored[0, :, span.only_start : span.ends[0]] = new.transpose(0, 1)
            else:
                slots, width = span.slots(stored.shape[1], self.capacity), stored.shape[3]
                flat = new.reshape(-1, width).to(stored.dtype)
                stored.view(-1, width).index_copy_(0, slots, flat)

    def reserve(self, positions: int) -> None:
        """Grow until there is room for so many positions, and for some more."""
        if positions > self.capacity:
            room = max(positions, self.capacity * 3 // 2)
            self.resize(-(-room // _CAPACITY_STEP) * _CAPACITY_STEP)

    def resize(self, capacity: int) -> None:
        """Make room for `capacity` positions, or cut to them."""
        more = capacity - self.capacity
        self.key, self.value = (F.pad(x, (0, 0, 0, more)) for x in (self.key, self.value))


Memory = GatedDeltaNetState | KeyValueCache | None  # of one layer; a layer of experts has none


@dataclass
class DeltaStack:
    """The states of all Gated DeltaNet layers in two tensors [layers,N,…], so that one launch reaches all of each.

    `parts` are the layers' own, by number, views of these.
    """

    whole: GatedDeltaNetState
    parts: dict[int, GatedDeltaNetState]

    @classmethod
    def of(cls, conv: Tensor, delta: Tensor, numbers: list[int]) -> "DeltaStack":
        """Cut two tensors into the layers of these numbers."""
        parts = {number: GatedDeltaNetState(conv[i], delta[i]) for i, number in enumerate(numbers)}
        return cls(GatedDeltaNetState(conv, delta), parts)

    def room(self, each: int) -> "DeltaStack":
        """Return memory for `each` times as many rows."""
        conv, delta = (x.new_empty(len(x), each * x.shape[1], *x.shape[2:]) for x in _tensors(self.whole))
        return DeltaStack.of(conv, delta, list(self.parts))


@dataclass
class DecodeState:
    """The memories of every layer for N sequences, and how many tokens each sequence has put in.

    `layers` are the trunk's, `mtp` the multi-token prediction layer's. While tokens are on trial,
    `pending` holds the states of each Gated DeltaNet layer after each of a sequence's last `prefixes`
    tokens, N·prefixes rows, until `keep` says how many of these tokens stay. In `stack` all these layers'
    states lie together, if `stack_up` was asked for it, and in `trial` the pending ones.

    `keep` asks the device and writes in place; `lengths` is what the host knows, and `count` tells it.
    `rotary_LR` are rotations of positions, made by `forward.py` as far as they were needed.
    """

    layers: list[Memory]
    mtp: list[Memory]
    lengths: list[int]
    prefixes: int = 1
    pending: dict[int, GatedDeltaNetState] = field(default_factory=dict)
    rotary_LR: Tensor | None = None
    stack: DeltaStack | None = None
    trial: DeltaStack | None = None

    @classmethod
    def empty(cls, model: Any, num_sequences: int) -> "DecodeState":
        """Return the state of sequences that have no tokens yet."""
        layers = [_empty_memory(layer, num_sequences) for layer in model.decoder.layers]
        mtp = [_empty_memory(layer, num_sequences) for layer in mtp_layers(model)]
        return cls(layers, mtp, [0] * num_sequences)

    def settle(self, kept: list[int]) -> None:
        """Count `kept[n]` of the last call's tokens of sequence n as its own, and take back the rest."""
        if self.pending:
            last = [row * self.prefixes + keep - 1 for row, keep in enumerate(kept)]
            self.keep(self._index(last))
        self.count(kept)

    def stack_up(self) -> None:
        """Move the states of all Gated DeltaNet layers, which are alike, into a stack: for one that stays in place."""
        own = {n: x for n, x in enumerate(self.layers) if isinstance(x, GatedDeltaNetState)}
        if own:
            conv = torch.stack([x.conv for x in own.values()])
            delta = torch.stack([x.delta for x in own.values()])
            self.stack = DeltaStack.of(conv, delta, list(own))
            self.layers = [self.stack.parts.get(n, x) for n, x in enumerate(self.layers)]

    def begin_trial(self, prefixes: int) -> dict[int, GatedDeltaNetState]:
        """Return room for the states after each of so many tokens, by layer; none where they do not lie in a stack."""
        in_place = self.stack is not None and all(
            self.layers[number] is part for number, part in self.stack.parts.items()
        )
        self.prefixes = prefixes
        self.trial = self.stack.room(prefixes) if in_place and self.stack else None
        return self.trial.parts if self.trial else {}

    def keep(self, row_N: Tensor) -> None:
        """Take the states in these rows of those on trial, one of each sequence."""
        for kept, after_each, dim in self._on_trial():
            for mine, theirs in zip(_tensors(kept), _tensors(after_each)):
                torch.index_select(theirs, dim, row_N, out=mine)
        self.pending, self.prefixes, self.trial = {}, 1, None

    def _on_trial(self) -> list[tuple[GatedDeltaNetState, GatedDeltaNetState, int]]:
        """Return states, those that may come in their place, and the dimension that counts rows."""
        if self.trial and self.stack:
            return [(self.stack.whole, self.trial.whole, 1)]
        own = {number: self.layers[number] for number in self.pending}
        return [(x, self.pending[number], 0) for number, x in own.items() if isinstance(x, GatedDeltaNetState)]

    def count(self, kept: list[int]) -> None:
        """Note how many of the last call's tokens stayed."""
        self.lengths = [length + keep for length, keep in zip(self.lengths, kept)]

    def select(self, rows: list[int]) -> "DecodeState":
        """Return the state of some of the sequences, in this order."""
        assert not self.pending, "settle first"
        if rows == list(range(len(self.lengths))):
            return self
        index = self._index(rows)
        return DecodeState(
            [_rows(memory, index) for memory in self.layers],
            [_rows(memory, index) for memory in self.mtp],
            [self.lengths[row] for row in rows],
            rotary_LR=self.rotary_LR,
        )

    def _index(self, rows: list[int]) -> Tensor:
        """Return row numbers where the memories are: one transfer for all layers."""
        devices = (_tensors(memory)[0].device for memory in self.layers if memory is not None)
        return torch.tensor(rows, dtype=torch.long).to(next(devices), non_blocking=True)

    def join(self, other: "DecodeState") -> "DecodeState":
        """Return the state of these sequences followed by the others."""
        assert not self.pending, "settle first"
        assert not other.pending, "settle first"
        return DecodeState(
            [_joined(a, b) for a, b in zip(self.layers, other.layers)],
            [_joined(a, b) for a, b in zip(self.mtp, other.mtp)],
            self.lengths + other.lengths,
            rotary_LR=self.rotary_LR if other.rotary_LR is None else other.rotary_LR,
        )

    def take(self, other: "DecodeState") -> None:
        """Copy another state, of no more sequences, into the first rows of this one; the rest becomes zero.

        Zero, not left as it was: what a mask hides from attention is multiplied by 0, and must be finite.
        """
        longest = max(other.lengths)
        pairs = zip([*self.layers, *self.mtp], [*other.layers, *other.mtp], strict=True)
        for mine, theirs in pairs:
            if mine is None or theirs is None:
                continue
            for kept, new in zip(_tensors(mine), _tensors(theirs)):
                kept.zero_()
                if isinstance(mine, KeyValueCache):
                    new = new[:, :, :longest]  # less where the draft layer was not run
                    kept[: len(new), :, : new.shape[2]].copy_(new)
                else:
                    kept[: len(new)].copy_(new)

    def first(self, rows: int, lengths: list[int]) -> "DecodeState":
        """Return a view of the first rows, which have these lengths."""
        return DecodeState(
            [_first(memory, rows) for memory in self.layers],
            [_first(memory, rows) for memory in self.mtp],
            lengths,
            rotary_LR=self.rotary_LR,
        )

    def own(self) -> None:
        """Move to memory of its own what may be a view."""
        self.layers = [_cloned(memory) for memory in self.layers]
        self.mtp = [_cloned(memory) for memory in self.mtp]

    def num_bytes(self) -> tuple[int, int]:
        """Return the bytes of Gated DeltaNet states, which are constant, and of keys and values, which grow."""
        sizes = {GatedDeltaNetState: 0, KeyValueCache: 0}
        for memory in [*self.layers, *self.mtp]:
            if memory is not None:
                sizes[type(memory)] += sum(x.numel() * x.element_size() for x in _tensors(memory))
        return sizes[GatedDeltaNetState], sizes[KeyValueCache]


def mtp_layers(model: Any) -> nn.ModuleList | list[Any]:
    """Return the sublayers of the first multi-token prediction layer; none if the model has no MTP."""
    return model.mtp.layers[0].mtp_model_layer.layers if model.mtp_process else []


def _empty_memory(layer: Any, num_sequences: int) -> Memory:
    mixer = layer.self_attention
    if isinstance(mixer, GatedDeltaNet):
        return _empty_delta_state(mixer, num_sequences)
    if isinstance(mixer, SelfAttention):
        weight = mixer.linear_proj.weight
        heads, head_dim = mixer.num_query_groups_per_partition, mixer.hidden_size_per_attention_head
        nothing = torch.empty(num_sequences, heads, 0, head_dim, dtype=weight.dtype, device=weight.device)
        return KeyValueCache(nothing, nothing)
    return None


def _empty_delta_state(mixer: GatedDeltaNet, num_sequences: int) -> GatedDeltaNetState:
    weight = mixer.conv1d.weight
    return GatedDeltaNetState(
        weight.new_zeros(num_sequences, weight.shape[0], mixer.taps - 1),
        weight.new_zeros(
            num_sequences, mixer.value_heads, mixer.key_head_dim, mixer.value_head_dim, dtype=torch.float32
        ),
    )


def _tensors(memory: GatedDeltaNetState | KeyValueCache) -> tuple[Tensor, Tensor]:
    if isinstance(memory, GatedDeltaNetState):
        return memory.conv, memory.delta
    return memory.key, memory.value


def _rows(memory: Memory, index: Tensor) -> Memory:
    """Return some rows of a memory."""
    if memory is None:
        return None
    return type(memory)(*(x.index_select(0, index) for x in _tensors(memory)))


def _first(memory: Memory, rows: int) -> Memory:
    return None if memory is None else type(memory)(*(x[:rows] for x in _tensors(memory)))


def _cloned(memory: Memory) -> Memory:
    return None if memory is None else type(memory)(*(x.clone() for x in _tensors(memory)))


def _joined(first: Memory, second: Memory) -> Memory:
    if first is None or second is None:
        return None
    if isinstance(first, KeyValueCache) and isinstance(second, KeyValueCache):
        room = max(first.capacity, second.capacity)
        for cache in (first, second):
            cache.resize(room)
    return type(first)(*(torch.cat(pair) for pair in zip(_tensors(first), _tensors(second))))
