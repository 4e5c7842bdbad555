"""Gated attention over the keys and values of earlier tokens: the one core for generation, on every device.

The training cores (attention.py, TransformerEngine's) see all tokens of a sequence at once. Here a
few new tokens ask and many old ones answer. A handful of tokens per sequence, as in decoding and in
verifying drafts, is two batched products per key/value head, its group of query heads stacked as
rows: no key or value is repeated, and memory is read once. Longer spans, as in prefill, go sequence
by sequence through scaled_dot_product_attention, which has fused kernels for them.

Projections, QK-norm, gate and output projection are megatron-core's SelfAttention's own.

Shapes: as in decode_state.py and span.py; H query heads, R = H / Hkv.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _rotate_half
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_q3n.model.attention import window_tokens
from megatron_q3n.model.decode_state import KeyValueCache
from megatron_q3n.model.span import Span


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

    Shape: [T,N,1,2·rotary dim], the cosine, then the sine with the sign that each half of the channels takes.
    """

    rows: Tensor

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
    mixer: Any, hidden: Tensor, cache: KeyValueCache, span: Span, rotary: Rotary | RotaryRows
) -> Tensor:
    """Run gated attention on new tokens up to its last projection, and add them to the cache.

    Shapes: hidden [T,N,·] or [S,1,·] as the span arranges it, the rotation likewise.
    Returns: [T,N,H·D] or [S,1,H·D].
    """
    gated = mixer.config.attention_output_gate
    query, key, value, *gate = mixer.get_query_key_value_tensors(hidden, output_gate=gated)
    heads = [query.shape[2], key.shape[2]]
    query, key = rotary.turn(torch.cat([query, key], 2)).split(heads, 2)
    cache.write(span.flatten(key), span.flatten(value), span)
    scale = mixer.config.softmax_scale or mixer.hidden_size_per_attention_head**-0.5
    window = window_tokens(mixer.config)
    if span.is_short:
        core = _attend_few(query, cache, span, scale, window)
    else:
        core = span.arrange(_attend_each(span.flatten(query), cache, span, scale, window))
    core = core.flatten(2)
    if gated:
        core = _opened(mixer, core, gate[0])
    return core


def _opened(mixer: Any, core: Tensor, gate: Tensor) -> Tensor:
    """Gate what the heads have read. Shapes: core [T,N,H·D]; gate [T,N,H,D], or a variant's."""
    if type(mixer) is not SelfAttention:
        return mixer._apply_output_gate(core, gate)
    # megatron-core's own is compiled anew for every number of tokens, seconds each
    return (core * gate.flatten(2).float().sigmoid()).to(core.dtype)


def _attend_few(
    query_TNHD: Tensor, cache: KeyValueCache, span: Span, scale: float, window: int | None
) -> Tensor:
    """Let T tokens of every sequence ask at once. Returns [T,N,H,D]."""
    tokens, rows, heads, head_dim = query_TNHD.shape
    groups, seen = cache.key.shape[1], max(span.ends)
    key, value = (x[:, :, :seen].flatten(0, 1) for x in (cache.key, cache.value))
    # [T,N,H,D] -> [N·Hkv, R·T, D]
    query = query_TNHD.unflatten(2, (groups, heads // groups)).permute(1, 2, 3, 0, 4)
    query = query.reshape(rows * groups, -1, head_dim)
    scores = _wide_product(query * scale, key.transpose(1, 2))
    scores = scores.view(rows, groups, heads // groups, tokens, seen)
    hidden_NTL = span.future_NTL if window is None else span.outside_NTL(window)
    scores = scores.masked_fill(hidden_NTL[:, None, None], float("-inf"))
    weights = scores.softmax(-1).to(value.dtype).view(rows * groups, -1, seen)
    core = torch.bmm(weights, value).view(rows, groups, heads // groups, tokens, head_dim)
    return core.permute(3, 0, 1, 2, 4).flatten(2, 3)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply batches of matrices into fp32: scores rounded to bf16 would move the softmax."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b).float() if a.dtype != torch.float64 else torch.bmm(a, b)


def _attend_each(
    query_SHD: Tensor, cache: KeyValueCache, span: Span, scale: float, window: int | None
) -> Tensor:
    """Let the tokens of one sequence after the other ask. Returns [S,H,D]."""
    outputs = []
    for row, (query, end) in enumerate(zip(query_SHD.split(span.counts), span.ends)):
        first = 0 if window is None else max(0, end - len(query) - window + 1)
        key, value = (x[row : row + 1, :, first:end] for x in (cache.key, cache.value))
        mask = (
            causal_lower_right(len(query), end)
            if window is None
            else _band(query, end - first, window)
        )
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
