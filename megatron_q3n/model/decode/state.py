"""Decode state: KV cache and Gated DeltaNet recurrent state of a batch of sequences, carried from pass to pass.

A Gated DeltaNet layer carries the last inputs of its convolution and one matrix per head, of constant size. A gated
attention layer carries keys and values of every token. Each sequence is one row of every tensor and has its own length;
rows can be joined and selected (continuous batching).

Draft tokens (speculative decoding) are run before it is known which of them are accepted. KV cache entries past a
sequence's length are ignored and later overwritten. A recurrent state cannot be shortened, so `begin_draft` prepares a
buffer for the state after every draft token, and a commit copies back the state after the last accepted one.

forward.py runs the layers, attention.py attends to the cached keys and values.

Shapes: N sequences, S all new tokens, Hkv key/value heads of this rank, D head dim, C capacity in tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_q3n.model.decode.protocols import DecodeModel, Sublayer
from megatron_q3n.model.decode.span import Span
from megatron_q3n.model.gated_delta_net import GatedDeltaNet, GatedDeltaNetState

# positions; the capacity also grows by at least half, so that reallocations are rare
_CAPACITY_STEP = 64


@dataclass
class KVCache:
    """KV cache of one attention layer: keys (after RoPE) and values. Shapes: [N,Hkv,C,D] each.

    Entries past a sequence's length are never read, so rolling back tokens only shortens the length.
    """

    key: Tensor
    value: Tensor

    @property
    def capacity(self) -> int:
        """Number of positions allocated for each sequence."""
        return self.key.shape[2]

    def write(self, key_SHD: Tensor, value_SHD: Tensor, span: Span) -> None:
        """Write the new tokens' keys and values at their positions."""
        self.reserve(max(span.ends))
        for cached, new in ((self.key, key_SHD), (self.value, value_SHD)):
            # a single sequence with a start known to the host: a plain copy, which needs no index
            if span.single_start is not None:
                cached[0, :, span.single_start : span.ends[0]] = new.transpose(0, 1)
            else:
                slots, head_dim = span.slot_mapping(cached.shape[1], self.capacity), cached.shape[3]
                flat = new.reshape(-1, head_dim).to(cached.dtype)
                cached.view(-1, head_dim).index_copy_(0, slots, flat)

    def reserve(self, positions: int) -> None:
        """Grow the capacity to at least `positions`."""
        if positions > self.capacity:
            capacity = max(positions, self.capacity * 3 // 2)
            self.resize(-(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP)

    def resize(self, capacity: int) -> None:
        """Set the capacity: pad with zeros, or truncate."""
        growth = capacity - self.capacity
        self.key, self.value = (F.pad(x, (0, 0, 0, growth)) for x in (self.key, self.value))


# state of one sublayer; None for an MoE sublayer
LayerState = GatedDeltaNetState | KVCache | None


@dataclass
class StackedDeltaStates:
    """States of all Gated DeltaNet layers in two tensors [layers,N,…], so that one kernel launch updates all layers.

    `by_layer` holds views of `stacked`, by layer number.
    """

    stacked: GatedDeltaNetState
    by_layer: dict[int, GatedDeltaNetState]

    @classmethod
    def of(cls, conv: Tensor, delta: Tensor, layer_numbers: list[int]) -> "StackedDeltaStates":
        """Split two tensors [layers,N,…] into views for these layers."""
        by_layer = {number: GatedDeltaNetState(conv[i], delta[i]) for i, number in enumerate(layer_numbers)}
        return cls(GatedDeltaNetState(conv, delta), by_layer)

    def empty_per_token(self, num_tokens: int) -> "StackedDeltaStates":
        """Allocate `num_tokens` states for each sequence: N·num_tokens rows."""
        conv, delta = (x.new_empty(len(x), num_tokens * x.shape[1], *x.shape[2:]) for x in _tensors(self.stacked))
        return StackedDeltaStates.of(conv, delta, list(self.by_layer))


@dataclass
class DecodeState:
    """States of every layer for N sequences, and how many tokens each sequence has.

    `layers` are the trunk's, `mtp` the multi-token prediction layer's. Between `begin_draft` and a commit,
    `draft_states` holds the states of each Gated DeltaNet layer after each of a sequence's `num_draft_tokens` last
    tokens: N·num_draft_tokens rows, a sequence's rows adjacent. `stack` holds all these layers' states in one
    allocation, after `stack_states`; `draft_stack` does the same for the draft states.

    `commit_states` runs on the device and writes in place; `lengths` is the host's copy of the lengths, and `advance`
    updates it. `rope_table_LW` is the RoPE table of the first positions (model/rope.py), extended by forward.py when
    needed.
    """

    layers: list[LayerState]
    mtp: list[LayerState]
    lengths: list[int]
    num_draft_tokens: int = 1
    draft_states: dict[int, GatedDeltaNetState] = field(default_factory=dict)
    rope_table_LW: Tensor | None = None
    stack: StackedDeltaStates | None = None
    draft_stack: StackedDeltaStates | None = None

    @classmethod
    def empty(cls, model: DecodeModel, num_sequences: int) -> "DecodeState":
        """Return the state of sequences without tokens."""
        layers = [_empty_layer_state(layer, num_sequences) for layer in model.decoder.layers]
        mtp = [_empty_layer_state(layer, num_sequences) for layer in mtp_layers(model)]
        return cls(layers, mtp, [0] * num_sequences)

    def stack_states(self) -> None:
        """Move the states of all Gated DeltaNet layers, which have equal shapes, into one `stack`."""
        by_layer = {n: x for n, x in enumerate(self.layers) if isinstance(x, GatedDeltaNetState)}
        if by_layer:
            conv = torch.stack([x.conv for x in by_layer.values()])
            delta = torch.stack([x.delta for x in by_layer.values()])
            self.stack = StackedDeltaStates.of(conv, delta, list(by_layer))
            self.layers = [self.stack.by_layer.get(n, x) for n, x in enumerate(self.layers)]

    def begin_draft(self, num_draft_tokens: int) -> dict[int, GatedDeltaNetState]:
        """Start a pass whose tokens may be rolled back.

        Returns: buffers for the states after each token, by layer; empty where the layers' states are not stacked.
        """
        is_stacked = self.stack is not None and all(
            self.layers[number] is view for number, view in self.stack.by_layer.items()
        )
        self.num_draft_tokens = num_draft_tokens
        self.draft_stack = self.stack.empty_per_token(num_draft_tokens) if is_stacked and self.stack else None
        return self.draft_stack.by_layer if self.draft_stack else {}

    def commit(self, num_accepted: list[int]) -> None:
        """Commit `num_accepted[n]` of the last pass's tokens of sequence n, and roll back the rest."""
        if self.draft_states:
            last = [row * self.num_draft_tokens + count - 1 for row, count in enumerate(num_accepted)]
            self.commit_states(self._index(last))
        self.advance(num_accepted)

    def commit_states(self, row_N: Tensor) -> None:
        """Commit the draft states in these rows, one for each sequence, and drop the others."""
        for committed, drafts, dim in self._committed_and_drafts():
            for target, source in zip(_tensors(committed), _tensors(drafts)):
                torch.index_select(source, dim, row_N, out=target)
        self.draft_states, self.num_draft_tokens, self.draft_stack = {}, 1, None

    def _committed_and_drafts(self) -> list[tuple[GatedDeltaNetState, GatedDeltaNetState, int]]:
        """Return pairs of committed states and draft states, each with the dimension of the rows."""
        if self.draft_stack and self.stack:
            return [(self.stack.stacked, self.draft_stack.stacked, 1)]
        by_layer = {number: self.layers[number] for number in self.draft_states}
        return [(x, self.draft_states[n], 0) for n, x in by_layer.items() if isinstance(x, GatedDeltaNetState)]

    def advance(self, num_accepted: list[int]) -> None:
        """Add the number of committed tokens to the host's lengths."""
        self.lengths = [length + count for length, count in zip(self.lengths, num_accepted)]

    def select(self, rows: list[int]) -> "DecodeState":
        """Return the state of some sequences, in this order; this same object if it is all of them."""
        assert not self.draft_states, "commit first"
        if rows == list(range(len(self.lengths))):
            return self
        index = self._index(rows)
        return DecodeState(
            [_select_rows(state, index) for state in self.layers],
            [_select_rows(state, index) for state in self.mtp],
            [self.lengths[row] for row in rows],
            rope_table_LW=self.rope_table_LW,
        )

    def _index(self, rows: list[int]) -> Tensor:
        """Return row numbers on the states' device: one transfer for all layers."""
        devices = (_tensors(state)[0].device for state in self.layers if state is not None)
        return torch.tensor(rows, dtype=torch.long).to(next(devices), non_blocking=True)

    def join(self, other: "DecodeState") -> "DecodeState":
        """Return the state of these sequences followed by the other's."""
        assert not self.draft_states, "commit first"
        assert not other.draft_states, "commit first"
        return DecodeState(
            [_join(a, b) for a, b in zip(self.layers, other.layers)],
            [_join(a, b) for a, b in zip(self.mtp, other.mtp)],
            self.lengths + other.lengths,
            rope_table_LW=self.rope_table_LW if other.rope_table_LW is None else other.rope_table_LW,
        )

    def copy_from(self, other: "DecodeState") -> None:
        """Copy a state of at most as many sequences into the first rows, and zero the rest.

        Stale values must not remain: masked attention multiplies them by 0, so they have to be finite.
        """
        longest = max(other.lengths)
        pairs = zip([*self.layers, *self.mtp], [*other.layers, *other.mtp], strict=True)
        for target, source in pairs:
            if target is None or source is None:
                continue
            for buffer, new in zip(_tensors(target), _tensors(source)):
                buffer.zero_()
                if isinstance(target, KVCache):
                    # shorter than `longest` where the MTP layer has not run
                    new = new[:, :, :longest]
                    buffer[: len(new), :, : new.shape[2]].copy_(new)
                else:
                    buffer[: len(new)].copy_(new)

    def view_of_first(self, num_rows: int, lengths: list[int]) -> "DecodeState":
        """Return a view of the first rows, with these lengths."""
        return DecodeState(
            [_view_of_first(state, num_rows) for state in self.layers],
            [_view_of_first(state, num_rows) for state in self.mtp],
            lengths,
            rope_table_LW=self.rope_table_LW,
        )

    def clone_tensors(self) -> None:
        """Replace the tensors, which may be views of shared buffers, by copies."""
        self.layers = [_clone(state) for state in self.layers]
        self.mtp = [_clone(state) for state in self.mtp]

    def num_bytes(self) -> tuple[int, int]:
        """Return the bytes of the Gated DeltaNet states (constant) and of the KV cache (linear in the length)."""
        sizes = {GatedDeltaNetState: 0, KVCache: 0}
        for state in [*self.layers, *self.mtp]:
            if state is not None:
                sizes[type(state)] += sum(x.numel() * x.element_size() for x in _tensors(state))
        return sizes[GatedDeltaNetState], sizes[KVCache]


def mtp_layers(model: DecodeModel) -> Sequence[Sublayer]:
    """Return the sublayers of the first multi-token prediction layer; empty if the model has none."""
    return model.mtp.layers[0].mtp_model_layer.layers if model.mtp_process else []


def _empty_layer_state(layer: Sublayer, num_sequences: int) -> LayerState:
    mixer = layer.self_attention
    if isinstance(mixer, GatedDeltaNet):
        return _empty_delta_state(mixer, num_sequences)
    if isinstance(mixer, SelfAttention):
        weight = mixer.linear_proj.weight
        heads, head_dim = mixer.num_query_groups_per_partition, mixer.hidden_size_per_attention_head
        empty = torch.empty(num_sequences, heads, 0, head_dim, dtype=weight.dtype, device=weight.device)
        return KVCache(empty, empty)
    return None


def _empty_delta_state(mixer: GatedDeltaNet, num_sequences: int) -> GatedDeltaNetState:
    weight, heads = mixer.conv1d.weight, mixer.heads
    return GatedDeltaNetState(
        weight.new_zeros(num_sequences, weight.shape[0], mixer.conv_kernel_size - 1),
        weight.new_zeros(num_sequences, heads.value_heads, heads.key_dim, heads.value_dim, dtype=torch.float32),
    )


def _tensors(state: GatedDeltaNetState | KVCache) -> tuple[Tensor, Tensor]:
    if isinstance(state, GatedDeltaNetState):
        return state.conv, state.delta
    return state.key, state.value


def _select_rows(state: LayerState, index: Tensor) -> LayerState:
    return None if state is None else type(state)(*(x.index_select(0, index) for x in _tensors(state)))


def _view_of_first(state: LayerState, num_rows: int) -> LayerState:
    return None if state is None else type(state)(*(x[:num_rows] for x in _tensors(state)))


def _clone(state: LayerState) -> LayerState:
    return None if state is None else type(state)(*(x.clone() for x in _tensors(state)))


def _join(first: LayerState, second: LayerState) -> LayerState:
    if first is None or second is None:
        return None
    if isinstance(first, KVCache) and isinstance(second, KVCache):
        capacity = max(first.capacity, second.capacity)
        for cache in (first, second):
            cache.resize(capacity)
    return type(first)(*(torch.cat(pair) for pair in zip(_tensors(first), _tensors(second))))
