"""Gated attention over the keys and values of earlier tokens: the one core for generation, on every device.

The training cores (model/attention/core.py, TransformerEngine's) see all tokens of a sequence at once. Here a
few new tokens ask and many old ones answer. A handful of tokens per sequence, as in decoding and in
verifying drafts, is two batched products per key/value head, its group of query heads stacked as
rows: no key or value is repeated, and memory is read once. On a GPU that is two launches from one
projection to the other (kernels/decode/attention.py). Longer spans, as in prefill, go sequence by sequence
through scaled_dot_product_attention, which has fused kernels for them.

Projections, QK-norm, gate and output projection are the layer's own, with its own weights.

Shapes: as in state.py and span.py; H query heads, R = H / Hkv.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _rotate_half
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_q3n.kernels import registry
from megatron_q3n.kernels.decode import attention as decode_attention
from megatron_q3n.model.attention.core import window_tokens
from megatron_q3n.model.attention.gated_attention import GatedAttention
from megatron_q3n.model.attention.variants import VariantAttention
from megatron_q3n.model.decode.fused_linear import project_normed
from megatron_q3n.model.decode.span import Span
from megatron_q3n.model.decode.state import KeyValueCache


@dataclass(frozen=True)
class Rotary:
    """RoPE for the positions of one pass, shared by its layers. Shapes: cos and sin [T,N,1,rotary dim]."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    @classmethod
    def at(cls, positions_TN: Tensor, embedding: Any, dtype: torch.dtype) -> "Rotary":
        """Return the rotation at these positions, as megatron-core's RotaryEmbedding turns."""
        frequencies = embedding.inv_freq.to(positions_TN.device)
        half = positions_TN.to(frequencies.dtype)[..., None, None] * frequencies
        interleaved = embedding.rotary_interleaved
        angles = half.repeat_interleave(2, -1) if interleaved else torch.cat([half, half], -1)
        return cls(angles.cos().to(dtype), angles.sin().to(dtype), interleaved)

    def turn(self, x_TNHD: Tensor) -> Tensor:
        """Rotate the first channels of each head."""
        width = self.cos.shape[-1]
        turned, rest = x_TNHD[..., :width], x_TNHD[..., width:]
        turned = turned * self.cos + _rotate_half(turned, self.interleaved) * self.sin
        return torch.cat([turned, rest], -1)


@dataclass(frozen=True)
class RotaryRows:
    """The same as rows of a table of all positions: one launch to read, three to turn, no gradient.

    Shape: table [L,2·rotary dim], the cosine, then the sine with the sign that each half of the channels takes.
    """

    table_LW: Tensor
    span: Span

    @cached_property
    def rows(self) -> Tensor:
        """The rows of the span's positions [T,N,1,2·rotary dim]."""
        rows_SW = self.table_LW.index_select(0, self.span.position_S)
        return self.span.arrange(rows_SW)[:, :, None]

    @staticmethod
    def table(num_positions: int, embedding: Any, dtype: torch.dtype) -> Tensor:
        """Return the rows of the first positions [L,2·rotary dim], for a rotation that is not interleaved."""
        device = torch.cuda.current_device()
        one = Rotary.at(torch.arange(num_positions, device=device)[:, None], embedding, dtype)
        first, second = one.sin.chunk(2, -1)
        return torch.cat([one.cos, -first, second], -1).flatten(1)

    def turn(self, x_TNHD: Tensor) -> Tensor:
        """Rotate the first channels of each head where they lie."""
        cos, signed_sin = self.rows.chunk(2, -1)
        turned = x_TNHD[..., : cos.shape[-1]]
        swapped = turned.roll(cos.shape[-1] // 2, -1)
        turned.mul_(cos).addcmul_(swapped, signed_sin)
        return x_TNHD


def attend(
    mixer: Any, hidden: Tensor, cache: KeyValueCache, span: Span, rotary: Rotary | RotaryRows, norm: Any = None
) -> Tensor:
    """Run gated attention on new tokens up to its last projection, and add them to the cache.

    Shapes: hidden [T,N,·] or [S,1,·] as the span arranges it, the rotation likewise; `norm` is the layer's first, or
        None where it was done.
    Returns: [T,N,H·D] or [S,1,H·D].
    """
    if isinstance(rotary, RotaryRows) and _goes_at_once(mixer, hidden, span):
        return attend_at_once(mixer, hidden, cache, span, rotary.table_LW, norm=norm)
    if norm is not None:
        hidden = norm(hidden)
    gated = mixer.config.attention_output_gate
    query, key, value, *gate = mixer.get_query_key_value_tensors(hidden, output_gate=gated)
    heads = [query.shape[2], key.shape[2]]
    query, key = rotary.turn(torch.cat([query, key], 2)).split(heads, 2)
    cache.write(span.flatten(key), span.flatten(value), span)
    scale, window = _scale(mixer), window_tokens(mixer.config)
    if span.is_short:
        hidden_NTL = span.future_NTL if window is None else span.outside_NTL(window)
        key, value = (x[:, :, : max(span.ends)] for x in (cache.key, cache.value))
        core = decode_attention.read(query, key, value, hidden_NTL, scale)
    else:
        core = span.arrange(_attend_each(span.flatten(query), cache, span, scale, window))
    core = core.flatten(2)
    if gated:
        core = _opened(mixer, core, gate[0])
    return core


def _opened(mixer: Any, core: Tensor, gate: Tensor) -> Tensor:
    """Gate what the heads have read. Shapes: core [T,N,H·D]; gate [T,N,H,D], or a variant's."""
    if type(mixer) is not GatedAttention:
        return mixer._apply_output_gate(core, gate)
    # megatron-core's own is compiled anew for every number of tokens, seconds each
    return decode_attention.opened(core, gate.flatten(2))


def _scale(mixer: Any) -> float:
    return mixer.config.softmax_scale or mixer.hidden_size_per_attention_head**-0.5


def _goes_at_once(mixer: Any, hidden: Tensor, span: Span) -> bool:
    """Whether the fused kernels run on these tokens, and compute what the layer would."""
    if not span.is_short or torch.is_grad_enabled():
        return False
    fused = registry.is_fused(decode_attention.OPERATION, hidden)
    return fused and serves(mixer) and decode_attention.fits(_heads(mixer), span.counts[0])


def serves(mixer: Any) -> bool:
    """Whether `attend_at_once` knows what this layer does between its projections."""
    config = mixer.config
    if type(mixer) is not GatedAttention:
        sigmoid = not config.attention_output_gate or mixer.activation is torch.sigmoid
        if not (type(mixer) is VariantAttention and mixer.linear_gate is None and sigmoid):
            return False
    is_plain = config.normalization == "RMSNorm" and not (
        config.qk_l2_norm or config.add_qkv_bias or config.add_bias_linear
    )
    norms = (mixer.q_layernorm is None) == (mixer.k_layernorm is None)
    # with fewer groups than ranks, a rank gathers other ranks' projections
    return is_plain and norms and config.num_query_groups >= mixer.pg_collection.tp.size()


def attend_at_once(
    mixer: Any,
    hidden_TNX: Tensor,
    cache: KeyValueCache,
    span: Span,
    rotary_LW: Tensor,
    fused: bool | None = None,
    norm: Any = None,
) -> Tensor:
    """Do what `attend` does with a few tokens of every sequence, between the projections as one operation.

    Returns: [T,N,H·D].
    """
    cache.reserve(max(span.ends))
    start_N = span.start_N
    if start_N is None:
        start_N = span.position_S.view(len(span.counts), -1)[:, 0].contiguous()
    linears, group = (mixer.linear_qkv,), mixer.pg_collection.tp
    (qkv_TNX,) = project_normed(norm, linears, hidden_TNX, mixer.config, group)
    given = qkv_TNX, _heads(mixer), _norms(mixer), rotary_LW, start_N, max(span.starts)
    return decode_attention.few_queries(*given, cache.key, cache.value, fused)


def _heads(mixer: Any) -> decode_attention.AttentionHeads:
    """What this rank's heads are like."""
    groups = mixer.num_query_groups_per_partition
    queries = mixer.num_attention_heads_per_partition // groups
    gated, dim = mixer.config.attention_output_gate, mixer.hidden_size_per_attention_head
    window = window_tokens(mixer.config)
    return decode_attention.AttentionHeads(groups, queries, dim, gated, _scale(mixer), window)


def _norms(mixer: Any) -> decode_attention.HeadNorms | None:
    if mixer.q_layernorm is None:
        return None
    config, weights = mixer.config, (mixer.q_layernorm.weight, mixer.k_layernorm.weight)
    offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
    return decode_attention.HeadNorms(*weights, config.layernorm_epsilon, offset)


def _attend_each(query_SHD: Tensor, cache: KeyValueCache, span: Span, scale: float, window: int | None) -> Tensor:
    """Let the tokens of one sequence after the other ask. Returns [S,H,D]."""
    outputs = []
    for row, (query, end) in enumerate(zip(query_SHD.split(span.counts), span.ends)):
        first = 0 if window is None else max(0, end - len(query) - window + 1)
        key, value = (x[row : row + 1, :, first:end] for x in (cache.key, cache.value))
        mask = causal_lower_right(len(query), end) if window is None else _band(query, end - first, window)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None], key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _band(query_SHD: Tensor, num_keys: int, window: int) -> Tensor:
    """Return which of so many tokens the last S of them see: themselves and those before, up to a window."""
    seen = torch.arange(num_keys, device=query_SHD.device)
    asking = seen[num_keys - len(query_SHD) :, None]
    return (seen <= asking) & (seen > asking - window)
