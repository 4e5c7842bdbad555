"""What a batch of sequences carries from one call of the model to the next while text is generated.

A Gated DeltaNet layer carries a few inputs of its convolution and one matrix per head, however long
the sequence: its memory does not grow. A gated attention layer carries keys and values of every
token. Sequences are rows, they have lengths of their own, and rows may join and leave.

No arithmetic here: `decode.py` runs the layers, `cached_attention.py` reads the keys and values.

Shapes: N sequences, T new tokens of each, S all new tokens, Hkv key/value heads of this rank,
L positions, D head dim, C capacity, K convolution taps.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from megatron_q3n.model.gated_delta_net import GatedDeltaNet, GatedDeltaNetState

_SHORT = 16  # new tokens per sequence: decoding, and drafts to verify
_CAPACITY_STEP = 64  # positions; a cache also grows by half, so that copies are rare


@dataclass
class Span:
    """The new tokens of one call: `counts[n]` of them for sequence n, which has `starts[n]` before.

    Tokens come flat and sequence by sequence. Where all counts are equal the layers see a batch
    [T,N]; else one packed row [S,1].
    """

    starts: list[int]
    counts: list[int]
    device: torch.device

    def __post_init__(self) -> None:
        assert len(self.starts) == len(self.counts) > 0
        assert min(self.counts) > 0
        self.is_batch = len(set(self.counts)) == 1
        rows = [row for row, count in enumerate(self.counts) for _ in range(count)]
        positions = [
            start + i for start, count in zip(self.starts, self.counts) for i in range(count)
        ]
        both = torch.tensor([rows, positions]).to(self.device, non_blocking=True)
        self.row_S, self.position_S = both[0], both[1]
        # bounds of the sequences in a packed row [N+1]; None for a batch
        self.cu_seqlens = None if self.is_batch else self._bounds()

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
        """Tokens of each sequence after the call."""
        return [start + count for start, count in zip(self.starts, self.counts)]

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
        self._reserve(max(span.ends))
        for stored, new in ((self.key, key_SHD), (self.value, value_SHD)):
            if len(span.starts) == 1:  # a plain copy is one launch, scattering by index is several
                stored[0, :, span.starts[0] : span.ends[0]] = new.transpose(0, 1)
            else:
                stored[span.row_S, :, span.position_S] = new.to(stored.dtype)

    def _reserve(self, positions: int) -> None:
        if positions > self.capacity:
            room = max(positions, self.capacity * 3 // 2)
            self.resize(-(-room // _CAPACITY_STEP) * _CAPACITY_STEP)

    def resize(self, capacity: int) -> None:
        """Make room for `capacity` positions, or cut to them."""
        more = capacity - self.capacity
        self.key, self.value = (F.pad(x, (0, 0, 0, more)) for x in (self.key, self.value))


Memory = GatedDeltaNetState | KeyValueCache | None  # of one layer; a layer of experts has none


@dataclass
class DecodeState:
    """The memories of every layer for N sequences, and how many tokens each sequence has put in.

    `layers` are the trunk's, `mtp` the multi-token prediction layer's. Where `prefixes` is more than
    one, a Gated DeltaNet layer holds the states after each of a sequence's last `prefixes` tokens,
    N·prefixes rows, until `settle` says how many of these tokens stay.
    """

    layers: list[Memory]
    mtp: list[Memory]
    lengths: list[int]
    prefixes: int = 1

    @classmethod
    def empty(cls, model: Any, num_sequences: int) -> "DecodeState":
        """Return the state of sequences that have no tokens yet."""
        layers = [_empty_memory(layer, num_sequences) for layer in model.decoder.layers]
        mtp = [_empty_memory(layer, num_sequences) for layer in mtp_layers(model)]
        return cls(layers, mtp, [0] * num_sequences)

    def settle(self, kept: list[int]) -> None:
        """Count `kept[n]` of the last call's tokens of sequence n as its own, and take back the rest."""
        if self.prefixes > 1:
            rows = [row * self.prefixes + keep - 1 for row, keep in enumerate(kept)]
            index = self._index(rows)
            self.layers = [
                _rows(m, index) if isinstance(m, GatedDeltaNetState) else m for m in self.layers
            ]
            self.prefixes = 1
        self.lengths = [length + keep for length, keep in zip(self.lengths, kept)]

    def select(self, rows: list[int]) -> "DecodeState":
        """Return the state of some of the sequences, in this order."""
        assert self.prefixes == 1, "settle first"
        if rows == list(range(len(self.lengths))):
            return self
        index = self._index(rows)
        return DecodeState(
            [_rows(memory, index) for memory in self.layers],
            [_rows(memory, index) for memory in self.mtp],
            [self.lengths[row] for row in rows],
        )

    def _index(self, rows: list[int]) -> Tensor:
        """Return row numbers where the memories are: one transfer for all layers."""
        devices = (_tensors(memory)[0].device for memory in self.layers if memory is not None)
        return torch.tensor(rows, dtype=torch.long).to(next(devices), non_blocking=True)

    def join(self, other: "DecodeState") -> "DecodeState":
        """Return the state of these sequences followed by the others."""
        assert self.prefixes == other.prefixes == 1, "settle first"
        return DecodeState(
            [_joined(a, b) for a, b in zip(self.layers, other.layers)],
            [_joined(a, b) for a, b in zip(self.mtp, other.mtp)],
            self.lengths + other.lengths,
        )

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
        nothing = torch.empty(
            num_sequences, heads, 0, head_dim, dtype=weight.dtype, device=weight.device
        )
        return KeyValueCache(nothing, nothing)
    return None


def _empty_delta_state(mixer: GatedDeltaNet, num_sequences: int) -> GatedDeltaNetState:
    weight = mixer.conv1d.weight
    return GatedDeltaNetState(
        weight.new_zeros(num_sequences, weight.shape[0], mixer.taps - 1),
        weight.new_zeros(
            num_sequences, mixer.value_heads, mixer.key_head_dim, mixer.value_head_dim,
            dtype=torch.float32,
        ),
    )  # fmt: skip


def _tensors(memory: GatedDeltaNetState | KeyValueCache) -> tuple[Tensor, Tensor]:
    if isinstance(memory, GatedDeltaNetState):
        return memory.conv, memory.delta
    return memory.key, memory.value


def _rows(memory: Memory, index: Tensor) -> Memory:
    """Return some rows of a memory."""
    if memory is None:
        return None
    return type(memory)(*(x.index_select(0, index) for x in _tensors(memory)))


def _joined(first: Memory, second: Memory) -> Memory:
    if first is None or second is None:
        return None
    if isinstance(first, KeyValueCache) and isinstance(second, KeyValueCache):
        room = max(first.capacity, second.capacity)
        for cache in (first, second):
            cache.resize(room)
    return type(first)(*(torch.cat(pair) for pair in zip(_tensors(first), _tensors(second))))
