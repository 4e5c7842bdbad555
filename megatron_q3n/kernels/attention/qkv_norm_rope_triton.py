# mypy: allow-untyped-defs
"""What stands before attention, in one pass each way: split of q|gate|k|v, norm of q and k, rotary positions.

The projection's rows are, group by group, its query heads, their gates, its key and its value. Forward the gates stay
where they are; backward their gradients, made elsewhere, are copied between the others'. One program walks along
tokens of one head. A norm's weight gradient is one partial sum per program, added in a fixed order.

T tokens, B rows, G groups, R query heads of each, D head dim (a power of two), N = T·B.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# H200, 16,384 tokens of 16 query and 2 key heads of 256: forward 0.101 ms (0.133 with 8 tokens a tile), backward 0.236;
# loading ahead takes too many registers here (0.171 and 0.313)
_FORWARD = {"BLOCK": 4, "TILES": 4, "num_warps": 4}
_BACKWARD = {"BLOCK": 8, "TILES": 16, "num_warps": 4}


@dataclass(frozen=True)
class AttentionShape:
    """Key/value groups, query heads of each, the size of all heads, whether gates lie behind a group's queries."""

    groups: int
    queries: int
    head_dim: int
    is_gated: bool

    @property
    def parts(self) -> list[int]:
        """Widths of a group's queries, gates, key and value."""
        queries = self.queries * self.head_dim
        return [queries, queries if self.is_gated else 0, self.head_dim, self.head_dim]


@triton.jit
def _copy(
    source_ptr, source_stride, target_ptr, target_stride, first, rows, d, BLOCK: tl.constexpr, TILES: tl.constexpr
):
    for tile in range(TILES):
        r = first + tile * BLOCK + tl.arange(0, BLOCK)
        exists, r = (r < rows)[:, None], r.to(tl.int64)[:, None]
        x = tl.load(source_ptr + r * source_stride + d, mask=exists)
        tl.store(target_ptr + r * target_stride + d, x, mask=exists)


@triton.jit
def _attention_inputs_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rows,
    batch,
    eps,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    GATED: tl.constexpr,
    DIM: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    group, head = tl.program_id(0) // (QUERIES + 2), tl.program_id(0) % (QUERIES + 2)
    gates: tl.constexpr = QUERIES if GATED else 0
    width: tl.constexpr = GROUPS * (QUERIES + gates + 2) * DIM
    place = tl.where(head < QUERIES, head, head + gates)
    qkv_ptr += (group * (QUERIES + gates + 2) + place) * DIM
    first = tl.program_id(1) * (TILES * BLOCK)
    d = tl.arange(0, DIM)[None, :]
    if head > QUERIES:
        _copy(qkv_ptr, width, v_ptr + group * DIM, GROUPS * DIM, first, rows, d, BLOCK, TILES)
    else:
        is_query = head < QUERIES
        weight_ptr = tl.where(is_query, q_weight_ptr, k_weight_ptr)
        out_ptr = tl.where(is_query, q_ptr, k_ptr)
        out_ptr += tl.where(is_query, group * QUERIES + head, group) * DIM
        out_width = tl.where(is_query, GROUPS * QUERIES * DIM, GROUPS * DIM)
        turns, half = d < TURNED, TURNED // 2
        other = tl.where(d < half, d + half, d - half)  # the channel that d turns with
        weight = 1 + tl.load(weight_ptr + d).to(tl.float32)
        other_weight = 1 + tl.load(weight_ptr + other, mask=turns, other=0.0).to(tl.float32)
        for tile in range(TILES):
            r = first + tile * BLOCK + tl.arange(0, BLOCK)
            exists, t = (r < rows)[:, None], (r // batch)[:, None] * TURNED
            r = r.to(tl.int64)[:, None]
            x = tl.load(qkv_ptr + r * width + d, mask=exists, other=0.0).to(tl.float32)
            x_other = tl.load(qkv_ptr + r * width + other, mask=exists & turns, other=0.0).to(tl.float32)
            cos = tl.load(cos_ptr + t + d, mask=exists & turns, other=1.0)
            sin = tl.load(sin_ptr + t + d, mask=exists & turns, other=0.0)
            scale = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
            across = x_other * other_weight * sin
            y = scale * (x * weight * cos + tl.where(d < half, -across, across))
            tl.store(out_ptr + r * out_width + d, y.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _attention_inputs_backward_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    dq_ptr,
    dgate_ptr,
    dk_ptr,
    dv_ptr,
    dqkv_ptr,
    dweight_ptr,
    rows,
    batch,
    eps,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    GATED: tl.constexpr,
    DIM: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    gates: tl.constexpr = QUERIES if GATED else 0
    each: tl.constexpr = QUERIES + gates + 2
    group, place = tl.program_id(0) // each, tl.program_id(0) % each
    width: tl.constexpr = GROUPS * each * DIM
    dqkv_ptr += tl.program_id(0) * DIM
    first = tl.program_id(1) * (TILES * BLOCK)
    d = tl.arange(0, DIM)[None, :]
    if (place >= QUERIES) & (place != QUERIES + gates):
        source_ptr = dv_ptr + group * DIM
        source_width = GROUPS * DIM
        if GATED:
            is_gate = place < QUERIES + gates
            gate_ptr = dgate_ptr + (group * QUERIES + place - QUERIES) * DIM
            source_ptr = tl.where(is_gate, gate_ptr, source_ptr)
            source_width = tl.where(is_gate, GROUPS * QUERIES * DIM, source_width)
        _copy(source_ptr, source_width, dqkv_ptr, width, first, rows, d, BLOCK, TILES)
    else:
        is_query = place < QUERIES
        weight_ptr = tl.where(is_query, q_weight_ptr, k_weight_ptr)
        d_ptr = tl.where(is_query, dq_ptr, dk_ptr)
        d_ptr += tl.where(is_query, group * QUERIES + place, group) * DIM
        d_width = tl.where(is_query, GROUPS * QUERIES * DIM, GROUPS * DIM)
        qkv_ptr += tl.program_id(0) * DIM
        turns, half = d < TURNED, TURNED // 2
        other = tl.where(d < half, d + half, d - half)
        weight = 1 + tl.load(weight_ptr + d).to(tl.float32)
        dweight = tl.zeros((BLOCK, DIM), tl.float32)
        for tile in range(TILES):
            r = first + tile * BLOCK + tl.arange(0, BLOCK)
            exists, t = (r < rows)[:, None], (r // batch)[:, None] * TURNED
            r = r.to(tl.int64)[:, None]
            x = tl.load(qkv_ptr + r * width + d, mask=exists, other=0.0).to(tl.float32)
            dout = tl.load(d_ptr + r * d_width + d, mask=exists, other=0.0).to(tl.float32)
            dout_other = tl.load(d_ptr + r * d_width + other, mask=exists & turns, other=0.0).to(tl.float32)
            cos = tl.load(cos_ptr + t + d, mask=exists & turns, other=1.0)
            sin = tl.load(sin_ptr + t + d, mask=exists & turns, other=0.0)
            across = dout_other * sin
            dy = dout * cos + tl.where(d < half, across, -across)
            scale = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
            unit, dunit = x * scale, dy * weight
            dweight += dy * unit
            dx = scale * (dunit - unit * (tl.sum(dunit * unit, axis=1) / DIM)[:, None])
            tl.store(dqkv_ptr + r * width + d, dx.to(dqkv_ptr.dtype.element_ty), mask=exists)
        share = tl.program_id(1) * (GROUPS * (QUERIES + 1)) + group * (QUERIES + 1)
        share += tl.where(is_query, place, QUERIES)
        tl.store(dweight_ptr + share * DIM + tl.arange(0, DIM), tl.sum(dweight, axis=0))


def attention_inputs(
    qkv_TBX: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    shape: AttentionShape,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split, normalise and turn.

    Shapes: projection [T,B,X] contiguous; cos and sin [T, turned channels] fp32, the second half as the first.
    Returns: query [T,B,G·R,D], key and value [T,B,G,D].
    """
    tokens, batch = qkv_TBX.shape[:2]
    assert qkv_TBX.is_contiguous()
    assert shape.head_dim & (shape.head_dim - 1) == 0, "heads of other sizes go another way"
    new = lambda heads: qkv_TBX.new_empty(tokens, batch, heads, shape.head_dim)
    query, key, value = new(shape.groups * shape.queries), new(shape.groups), new(shape.groups)
    blocks = triton.cdiv(tokens * batch, _FORWARD["BLOCK"] * _FORWARD["TILES"])
    _attention_inputs_kernel[(shape.groups * (shape.queries + 2), blocks)](
        qkv_TBX,
        cos_TR,
        sin_TR,
        q_weight_D,
        k_weight_D,
        query,
        key,
        value,
        tokens * batch,
        batch,
        eps,
        **_constants(shape, cos_TR),
        **_FORWARD,
    )
    return query, key, value


def attention_inputs_backward(
    qkv_TBX: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    shape: AttentionShape,
    eps: float,
    dquery: Tensor,
    dgate: Tensor | None,
    dkey: Tensor,
    dvalue: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the projection [T,B,X], and of both norms' weights (fp32)."""
    tokens, batch = qkv_TBX.shape[:2]
    assert shape.is_gated == (dgate is not None)
    dqkv = torch.empty_like(qkv_TBX)
    blocks = triton.cdiv(tokens * batch, _BACKWARD["BLOCK"] * _BACKWARD["TILES"])
    shares = qkv_TBX.new_empty(blocks, shape.groups, shape.queries + 1, shape.head_dim, dtype=torch.float32)
    heads = sum(shape.parts) // shape.head_dim
    _attention_inputs_backward_kernel[(shape.groups * heads, blocks)](
        qkv_TBX,
        cos_TR,
        sin_TR,
        q_weight_D,
        k_weight_D,
        dquery,
        dgate,
        dkey,
        dvalue,
        dqkv,
        shares,
        tokens * batch,
        batch,
        eps,
        **_constants(shape, cos_TR),
        **_BACKWARD,
    )
    of_heads = shares.sum((0, 1))
    return dqkv, of_heads[:-1].sum(0), of_heads[-1]


def _constants(shape: AttentionShape, cos_TR: Tensor) -> dict[str, int | bool]:
    return {
        "GROUPS": shape.groups,
        "QUERIES": shape.queries,
        "GATED": shape.is_gated,
        "DIM": shape.head_dim,
        "TURNED": cos_TR.shape[1],
    }
