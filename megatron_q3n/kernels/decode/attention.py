"""Decode attention: gated attention of a few new tokens over the KV cache, by flash-decoding with split-KV.

Covers everything between the projections: QK-norm, RoPE, the cache write, the causal or sliding-window mask, softmax
attention and the output gate. As torch operations that is some two dozen kernel launches for a few kilobytes. Fused,
one launch prepares the new tokens and attends to splits of the cache, and a second combines the splits and applies
the gate.

The number of keys is known on the device only: `start_N` cached tokens of each sequence, of at most `max_start`. What
lies behind them in the cache is never read. Without gradients.

Reference: FlashAttention-2 (arXiv 2307.08691), section 2.3, for the online softmax; the split over keys is that of
Flash-Decoding (pytorch.org/blog/flash-decoding).
Shapes: N sequences, T new tokens of each, G key/value heads, R query heads of each, D head dim, C cache capacity in
tokens, L positions, W rotated channels, X = G·(2R + 2)·D channels of the projection (R instead of 2R without a gate):
of each group its queries, their gates, key and value, in megatron-core's order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels.attention.rope import apply_rope
from megatron_q3n.kernels.decode.operands import AttentionHeads, QKNormWeights
from megatron_q3n.kernels.norms import accumulation_dtype


def decode_attention(
    qkv_TNX: Tensor,
    heads: AttentionHeads,
    norms: QKNormWeights | None,
    rotary_LW: Tensor,
    start_N: Tensor,
    max_start: int,
    key_NGCD: Tensor,
    value_NGCD: Tensor,
    fused: bool = False,
) -> Tensor:
    """Attend to the cache and the new tokens, and write the new tokens' keys and values into the cache.

    Shapes: qkv [T,N,X]; rotary [L,2W], for each position the cosine, then the sine, negated in its first half; start
        [N] int64, all ≤ `max_start`; cache [N,G,C,D] each, written at start … start + T - 1.
        `fused` runs the Triton kernels instead of the reference.
    Returns: [T,N,G·R·D].
    """
    operands = qkv_TNX, heads, norms, rotary_LW, start_N, max_start, key_NGCD, value_NGCD
    if fused:
        from megatron_q3n.kernels.decode import attention_triton as kernel  # late: Triton

        return kernel.decode_attention(*operands)
    return decode_attention_reference(*operands)


def decode_attention_reference(
    qkv_TNX: Tensor,
    heads: AttentionHeads,
    norms: QKNormWeights | None,
    rotary_LW: Tensor,
    start_N: Tensor,
    max_start: int,
    key_NGCD: Tensor,
    value_NGCD: Tensor,
) -> Tensor:
    """Compute decode attention from torch operations; arguments and returns as `decode_attention`."""
    (tokens, rows, _), num_groups, head_dim = qkv_TNX.shape, heads.num_groups, heads.head_dim
    query_width = heads.queries_per_group * head_dim
    sections = [query_width, query_width if heads.is_gated else 0, head_dim, head_dim]
    query, gate, key, value = qkv_TNX.view(tokens, rows, num_groups, -1).split(sections, -1)
    query = query.reshape(tokens, rows, -1, head_dim)
    if norms is not None:
        query, key = _qk_norm(query, norms.query_D, norms), _qk_norm(key, norms.key_D, norms)
    position_TN = start_N + torch.arange(tokens, device=start_N.device)[:, None]
    cos, sin = _rope_at(position_TN, rotary_LW)
    query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
    row_N = torch.arange(rows, device=start_N.device)
    for cache, new in ((key_NGCD, key), (value_NGCD, value)):
        cache[row_N[None], :, position_TN] = new.to(cache.dtype)
    end = max_start + tokens
    masked_NTL = masked_positions(position_TN.T, end, heads.window)
    core = attend(query, key_NGCD[:, :, :end], value_NGCD[:, :, :end], masked_NTL, heads.scale)
    if not heads.is_gated:
        return core.flatten(2)
    return apply_output_gate(core.flatten(2), gate.reshape(tokens, rows, -1))


def masked_positions(position_NT: Tensor, end: int, window: int | None) -> Tensor:
    """Return the mask [N,T,end], true where a position is in the future of a token or before its sliding window."""
    positions_L = torch.arange(end, device=position_NT.device)
    masked_NTL = positions_L > position_NT[..., None]
    return masked_NTL if window is None else masked_NTL | (positions_L <= position_NT[..., None] - window)


def attend(query_TNHD: Tensor, key_NGLD: Tensor, value_NGLD: Tensor, masked_NTL: Tensor, scale: float) -> Tensor:
    """Compute softmax attention of T tokens of every sequence; the query heads of a group are rows of one GEMM.

    Shapes: masked [N,T,L], true where a token does not attend to a key.
    Returns: [T,N,H,D].
    """
    tokens, rows, heads, head_dim = query_TNHD.shape
    num_groups, num_keys = key_NGLD.shape[1:3]
    key, value = key_NGLD.flatten(0, 1), value_NGLD.flatten(0, 1)
    # [T,N,H,D] -> [N·G, R·T, D]
    query = query_TNHD.unflatten(2, (num_groups, heads // num_groups)).permute(1, 2, 3, 0, 4)
    query = query.reshape(rows * num_groups, -1, head_dim)
    scores = _bmm_fp32(query * scale, key.transpose(1, 2))
    scores = scores.view(rows, num_groups, heads // num_groups, tokens, num_keys)
    scores = scores.masked_fill(masked_NTL[:, None, None], float("-inf"))
    weights = scores.softmax(-1).to(value.dtype).view(rows * num_groups, -1, num_keys)
    core = torch.bmm(weights, value).view(rows, num_groups, heads // num_groups, tokens, head_dim)
    return core.permute(3, 0, 1, 2, 4).flatten(2, 3)


def apply_output_gate(core: Tensor, gate: Tensor) -> Tensor:
    """Return core · sigmoid(gate) in core's dtype."""
    return (core * gate.to(accumulation_dtype(gate)).sigmoid()).to(core.dtype)


def _rope_at(position_TN: Tensor, rotary_LW: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [T,N,1,W] of these positions."""
    cos, negated_sin, sin = (
        rotary_LW[position_TN].unsqueeze(2).tensor_split([rotary_LW.shape[1] // 2, rotary_LW.shape[1] // 4 * 3], -1)
    )
    return cos, torch.cat([-negated_sin, sin], -1)


def _qk_norm(x_TNHD: Tensor, weight_D: Tensor, norms: QKNormWeights) -> Tensor:
    x = x_TNHD.to(accumulation_dtype(x_TNHD))
    scale = norms.offset + weight_D.to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], scale, norms.eps).to(x_TNHD.dtype)


def _bmm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Multiply batches of matrices into fp32 (fp64 for fp64 inputs): scores rounded to bf16 would move the softmax."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b).to(accumulation_dtype(a))
