"""Gated attention of a few new tokens over the keys and values of earlier ones: two launches between the projections.

In decoding a handful of tokens of each sequence ask, and what they do to themselves (QK-norm, RoPE,
cache, mask, gate) is a few kilobytes in some two dozen launches. Fused, one launch prepares the new
tokens and reads the cache in pieces, and a second adds the pieces up and gates them.

Which keys exist is known on the device alone: `start_N` earlier ones of each sequence, of at most
`room` places. What stands beyond is never read. Without gradients.

Shapes: N sequences, T new tokens of each, G key/value heads, R query heads of each, D head dim, C places
of the cache, L positions, W the channels that RoPE turns, X = G·(2R + 2)·D channels of the projection (R
instead of 2R without a gate): of each group its queries, their gates, key and value, as megatron-core lays them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels import registry

OPERATION = "attention of a few tokens"
MOST_TOKENS = 16
_HEAD_DIMS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class AttentionHeads:
    """What an attention layer's heads are like; `window` is how many tokens one sees, itself included."""

    groups: int
    queries: int  # of each group
    dim: int
    is_gated: bool
    scale: float
    window: int | None = None


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm over each query's and each key's D channels, times `offset` + weight: 1 where it is zero-centered."""

    query_D: Tensor
    key_D: Tensor
    eps: float
    offset: float = 1.0


def fits(heads: AttentionHeads, tokens: int) -> bool:
    """Whether the fused kernels have these sizes."""
    return tokens <= MOST_TOKENS and heads.dim in _HEAD_DIMS


def few_queries(
    qkv_TNX: Tensor,
    heads: AttentionHeads,
    norms: HeadNorms | None,
    rotary_LW: Tensor,
    start_N: Tensor,
    room: int,
    key_NGCD: Tensor,
    value_NGCD: Tensor,
    fused: bool | None = None,
) -> Tensor:
    """Attend, and write the new tokens' keys and values into the cache.

    Shapes: qkv [T,N,X]; rotary [L,2W], of each position the cosine, then the sine with the sign that each half of
        the channels takes; start [N] int64, all ≤ `room`; cache [N,G,C,D] each, written at start … start + T - 1.
        `fused` forces the choice that `choices` makes otherwise.
    Returns: [T,N,G·R·D].
    """
    if registry.is_fused(OPERATION, qkv_TNX, fused) and fits(heads, len(qkv_TNX)):
        from megatron_q3n.kernels.decode import attention_triton as kernel  # late: Triton

        given = qkv_TNX, heads, norms, rotary_LW, start_N, room, key_NGCD, value_NGCD
        return kernel.few_queries(*given)
    return composed_few_queries(qkv_TNX, heads, norms, rotary_LW, start_N, room, key_NGCD, value_NGCD)


def composed_few_queries(
    qkv_TNX: Tensor,
    heads: AttentionHeads,
    norms: HeadNorms | None,
    rotary_LW: Tensor,
    start_N: Tensor,
    room: int,
    key_NGCD: Tensor,
    value_NGCD: Tensor,
) -> Tensor:
    """Do it from torch operations."""
    (tokens, rows, _), groups, dim = qkv_TNX.shape, heads.groups, heads.dim
    each = heads.queries * dim
    sections = [each, each if heads.is_gated else 0, dim, dim]
    query, gate, key, value = qkv_TNX.view(tokens, rows, groups, -1).split(sections, -1)
    query = query.reshape(tokens, rows, -1, dim)
    if norms is not None:
        query, key = _normed(query, norms.query_D, norms), _normed(key, norms.key_D, norms)
    position_TN = start_N + torch.arange(tokens, device=start_N.device)[:, None]
    rotation_TN1W = rotary_LW[position_TN].unsqueeze(2)
    query, key = turned(query, rotation_TN1W), turned(key, rotation_TN1W)
    row_N = torch.arange(rows, device=start_N.device)
    for cache, new in ((key_NGCD, key), (value_NGCD, value)):
        cache[row_N[None], :, position_TN] = new.to(cache.dtype)
    end = room + tokens
    hidden_NTL = hidden_positions(position_TN.T, end, heads.window)
    core = read(query, key_NGCD[:, :, :end], value_NGCD[:, :, :end], hidden_NTL, heads.scale)
    if not heads.is_gated:
        return core.flatten(2)
    return opened(core.flatten(2), gate.reshape(tokens, rows, -1))


def hidden_positions(position_NT: Tensor, end: int, window: int | None) -> Tensor:
    """Return which positions below `end` come after each token, or so long before that a window ends [N,T,end]."""
    positions_L = torch.arange(end, device=position_NT.device)
    hidden_NTL = positions_L > position_NT[..., None]
    return hidden_NTL if window is None else hidden_NTL | (positions_L <= position_NT[..., None] - window)


def turned(x_TNHD: Tensor, rotation_TN1W: Tensor) -> Tensor:
    """Rotate the first channels of each head."""
    cos, signed_sin = rotation_TN1W.chunk(2, -1)
    width = cos.shape[-1]
    first, rest = x_TNHD[..., :width], x_TNHD[..., width:]
    return torch.cat([first * cos + first.roll(width // 2, -1) * signed_sin, rest], -1)


def read(query_TNHD: Tensor, key_NGLD: Tensor, value_NGLD: Tensor, hidden_NTL: Tensor, scale: float) -> Tensor:
    """Let T tokens of every sequence ask at once: the query heads of a group are rows of one product.

    Shapes: hidden [N,T,L], true where a token does not see a key.
    Returns: [T,N,H,D].
    """
    tokens, rows, heads, head_dim = query_TNHD.shape
    groups, seen = key_NGLD.shape[1:3]
    key, value = key_NGLD.flatten(0, 1), value_NGLD.flatten(0, 1)
    # [T,N,H,D] -> [N·G, R·T, D]
    query = query_TNHD.unflatten(2, (groups, heads // groups)).permute(1, 2, 3, 0, 4)
    query = query.reshape(rows * groups, -1, head_dim)
    scores = _wide_product(query * scale, key.transpose(1, 2))
    scores = scores.view(rows, groups, heads // groups, tokens, seen)
    scores = scores.masked_fill(hidden_NTL[:, None, None], float("-inf"))
    weights = scores.softmax(-1).to(value.dtype).view(rows * groups, -1, seen)
    core = torch.bmm(weights, value).view(rows, groups, heads // groups, tokens, head_dim)
    return core.permute(3, 0, 1, 2, 4).flatten(2, 3)


def opened(core: Tensor, gate: Tensor) -> Tensor:
    """Gate what the heads have read, in core's format."""
    wide = gate if gate.dtype == torch.float64 else gate.float()
    return (core * wide.sigmoid()).to(core.dtype)


def _normed(x_TNHD: Tensor, weight_D: Tensor, norms: HeadNorms) -> Tensor:
    wide = x_TNHD if x_TNHD.dtype == torch.float64 else x_TNHD.float()
    scale = norms.offset + weight_D.to(wide.dtype)
    return F.rms_norm(wide, wide.shape[-1:], scale, norms.eps).to(x_TNHD.dtype)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply batches of matrices into fp32: scores rounded to bf16 would move the softmax."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b).float() if a.dtype != torch.float64 else torch.bmm(a, b)
