"""Decode attention: gated attention of new tokens over a KV cache, on every device.

The training cores (model/attention/core.py, TransformerEngine's) get all tokens of a sequence at once. Here few new
queries meet many cached keys. Up to `Span.is_short` tokens per sequence (decoding, verification of draft tokens) are
two batched products per key/value head, with its group of query heads stacked as rows: no key or value is repeated, and
the cache is read once. On a GPU a fused kernel (flash-decoding, split-KV) does this in two launches between the
projections (kernels/decode/attention.py). Longer spans, as in prefill, run sequence by sequence through
scaled_dot_product_attention, which has fused kernels for them.

Projections, QK-norm, gate and output projection are the layer's own modules.

Shapes: as in state.py and span.py; H query heads, R = H / Hkv.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_q3n.config.execution_plan import DecodePlan
from megatron_q3n.kernels.decode import attention as decode_attention
from megatron_q3n.model.attention.core import window_tokens
from megatron_q3n.model.attention.gated_attention import GatedAttention
from megatron_q3n.model.decode.fused_linear import norm_and_project
from megatron_q3n.model.decode.protocols import AttentionMixer
from megatron_q3n.model.decode.span import Span
from megatron_q3n.model.decode.state import KVCache
from megatron_q3n.model.protocols import Norm
from megatron_q3n.model.rope import RopeAngles, RopeTable


def attend(
    mixer: AttentionMixer,
    hidden: Tensor,
    cache: KVCache,
    span: Span,
    rope: RopeAngles | RopeTable,
    norm: Norm | None = None,
) -> Tensor:
    """Run gated attention on new tokens up to its output projection, and write their keys and values to the cache.

    Shapes: hidden [T,N,·] or [S,1,·] in the span's layout, `rope` likewise. `norm` is the layer's input norm, or None
        if `hidden` is normalized already.
    Returns: [T,N,H·D] or [S,1,H·D].
    """
    plan: DecodePlan = mixer.config.plan.decode
    if plan.attention and isinstance(rope, RopeTable) and span.is_short and not torch.is_grad_enabled():
        return attend_fused(mixer, hidden, cache, span, rope.table_LW, norm=norm)
    if norm is not None:
        hidden = norm(hidden)
    is_gated = mixer.config.attention_output_gate
    query, key, value, *gate = mixer.get_query_key_value_tensors(hidden, output_gate=is_gated)
    heads = [query.shape[2], key.shape[2]]
    query, key = rope.apply(torch.cat([query, key], 2)).split(heads, 2)
    cache.write(span.flatten(key), span.flatten(value), span)
    scale, window = _scale(mixer), window_tokens(mixer.config)
    if span.is_short:
        masked_NTL = span.future_NTL if window is None else span.outside_window_NTL(window)
        key, value = (x[:, :, : max(span.ends)] for x in (cache.key, cache.value))
        core = decode_attention.attend(query, key, value, masked_NTL, scale)
    else:
        core = span.arrange(_attend_per_sequence(span.flatten(query), cache, span, scale, window))
    core = core.flatten(2)
    if is_gated:
        core = _apply_output_gate(mixer, core, gate[0])
    return core


def _apply_output_gate(mixer: AttentionMixer, core: Tensor, gate: Tensor) -> Tensor:
    """Gate the heads' outputs. Shapes: core [T,N,H·D]; gate [T,N,H,D], or a variant's."""
    if type(mixer) is not GatedAttention:
        return mixer._apply_output_gate(core, gate)
    # megatron-core's own is torch.compiled, and compiles for seconds at every new number of tokens
    return decode_attention.apply_output_gate(core, gate.flatten(2))


def _scale(mixer: AttentionMixer) -> float:
    return mixer.config.softmax_scale or mixer.hidden_size_per_attention_head**-0.5


def attend_fused(
    mixer: AttentionMixer,
    hidden_TNX: Tensor,
    cache: KVCache,
    span: Span,
    rope_table_LW: Tensor,
    fused: bool = True,
    norm: Norm | None = None,
) -> Tensor:
    """Compute `attend` for a short span, with everything between the projections as one operation.

    `fused` runs the kernel, else its torch reference.

    Returns: [T,N,H·D].
    """
    cache.reserve(max(span.ends))
    start_N = span.start_N
    if start_N is None:
        start_N = span.position_S.view(len(span.counts), -1)[:, 0].contiguous()
    (qkv_TNX,) = norm_and_project(norm, (mixer.linear_qkv,), hidden_TNX, mixer.config)
    arguments = qkv_TNX, _head_layout(mixer), _head_norms(mixer), rope_table_LW, start_N, max(span.starts)
    return decode_attention.decode_attention(*arguments, cache.key, cache.value, fused)


def _head_layout(mixer: AttentionMixer) -> decode_attention.AttentionHeads:
    """Return the head counts and sizes of this rank."""
    groups = mixer.num_query_groups_per_partition
    queries = mixer.num_attention_heads_per_partition // groups
    is_gated, dim = mixer.config.attention_output_gate, mixer.hidden_size_per_attention_head
    window = window_tokens(mixer.config)
    return decode_attention.AttentionHeads(groups, queries, dim, is_gated, _scale(mixer), window)


def _head_norms(mixer: AttentionMixer) -> decode_attention.QKNormWeights | None:
    """Return the QK-norm's parameters; None without QK-norm."""
    if mixer.q_layernorm is None or mixer.k_layernorm is None:
        return None
    config, weights = mixer.config, (mixer.q_layernorm.weight, mixer.k_layernorm.weight)
    offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
    return decode_attention.QKNormWeights(*weights, config.layernorm_epsilon, offset)


def _attend_per_sequence(query_SHD: Tensor, cache: KVCache, span: Span, scale: float, window: int | None) -> Tensor:
    """Compute attention one sequence after the other. Returns: [S,H,D]."""
    outputs = []
    for row, (query, end) in enumerate(zip(query_SHD.split(span.counts), span.ends)):
        first = 0 if window is None else max(0, end - len(query) - window + 1)
        key, value = (x[row : row + 1, :, first:end] for x in (cache.key, cache.value))
        mask = causal_lower_right(len(query), end) if window is None else _window_mask(query, end - first, window)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None], key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _window_mask(query_SHD: Tensor, num_keys: int, window: int) -> Tensor:
    """Return which of `num_keys` positions the last S of them attend to: a causal sliding window [S,num_keys]."""
    key_positions = torch.arange(num_keys, device=query_SHD.device)
    query_positions = key_positions[num_keys - len(query_SHD) :, None]
    return (key_positions <= query_positions) & (key_positions > query_positions - window)
