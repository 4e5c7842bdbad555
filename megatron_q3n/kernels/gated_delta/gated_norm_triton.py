# mypy: allow-untyped-defs
"""Gated DeltaNet's output norm in one pass: rms_norm(o) · SiLU(z), from [B,T,Hv,V] to the [T,B,Hv·V] out_proj wants.

z is read where it lies, as the last Hv·V channels of the projection's output, and its gradient is
written to the same place of the projection's gradient, so nothing is sliced, transposed or
concatenated. The weight's gradient is one partial sum per program, added in a fixed order.

T tokens, B rows, Hv heads, V head dim (a power of two), X projection channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_R = 32  # rows (token, row of the batch, head) per program


@triton.jit
def _rows(start, tokens, batch, HEADS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Number the rows (t, b, h), h fastest; return them, whether they exist, their place in [B,T,Hv], and t, b, h."""
    r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
    h, tb = r % HEADS, r // HEADS
    b, t = tb % batch, tb // batch
    return r, t < tokens, (b * tokens + t) * HEADS + h, t, b, h


@triton.jit
def _gated_norm_kernel(
    o_ptr,
    z_ptr,
    weight_ptr,
    out_ptr,
    tokens,
    batch,
    stride_t,
    stride_b,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    r, exists, place, t, b, h = _rows(tl.program_id(0) * BLOCK_R, tokens, batch, HEADS, BLOCK_R)
    dim = tl.arange(0, DIM)
    mask = exists[:, None]
    o = tl.load(o_ptr + place[:, None] * DIM + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    z_place = (t * stride_t + b * stride_b + h * DIM)[:, None] + dim[None, :]
    z = tl.load(z_ptr + z_place, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(o * o, axis=1) / DIM + eps)[:, None]
    weight = 1 + tl.load(weight_ptr + dim)[None, :]
    y = o * scale * weight * z * tl.sigmoid(z)
    tl.store(out_ptr + r[:, None] * DIM + dim[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_norm_backward_kernel(
    o_ptr,
    z_ptr,
    weight_ptr,
    dout_ptr,
    do_ptr,
    dz_ptr,
    dweight_ptr,
    tokens,
    batch,
    stride_t,
    stride_b,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    r, exists, place, t, b, h = _rows(tl.program_id(0) * BLOCK_R, tokens, batch, HEADS, BLOCK_R)
    dim = tl.arange(0, DIM)
    mask = exists[:, None]
    o_place = place[:, None] * DIM + dim[None, :]
    o = tl.load(o_ptr + o_place, mask=mask, other=0.0).to(tl.float32)
    z_place = (t * stride_t + b * stride_b + h * DIM)[:, None] + dim[None, :]
    z = tl.load(z_ptr + z_place, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + r[:, None] * DIM + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(o * o, axis=1) / DIM + eps)[:, None]
    weight = 1 + tl.load(weight_ptr + dim)[None, :]
    gate = tl.sigmoid(z)
    unit = o * scale
    dz = dout * unit * weight * gate * (1 + z * (1 - gate))
    tl.store(dz_ptr + z_place, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    dscaled = dout * z * gate
    tl.store(dweight_ptr + tl.program_id(0) * DIM + dim, tl.sum(dscaled * unit, axis=0))
    dunit = dscaled * weight
    do = scale * (dunit - unit * (tl.sum(dunit * unit, axis=1) / DIM)[:, None])
    tl.store(do_ptr + o_place, do.to(do_ptr.dtype.element_ty), mask=mask)


def gated_norm(o_BTHV: Tensor, qkvz_TBX: Tensor, weight_V: Tensor, eps: float) -> Tensor:
    """Normalise, gate and lay out for the next projection.

    Returns: [T,B,Hv·V] in the projection's dtype.
    """
    batch, tokens, heads, dim = o_BTHV.shape
    z_TBX = qkvz_TBX[..., -heads * dim :]
    out = qkvz_TBX.new_empty(tokens, batch, heads * dim)
    _gated_norm_kernel[(triton.cdiv(batch * tokens * heads, _BLOCK_R),)](
        o_BTHV.contiguous(),
        z_TBX,
        weight_V,
        out,
        tokens,
        batch,
        z_TBX.stride(0),
        z_TBX.stride(1),
        eps,
        HEADS=heads,
        DIM=dim,
        BLOCK_R=_BLOCK_R,
        num_warps=4,
    )
    return out


def gated_norm_backward(
    o_BTHV: Tensor, qkvz_TBX: Tensor, weight_V: Tensor, eps: float, dout: Tensor, dqkvz_TBX: Tensor
) -> tuple[Tensor, Tensor]:
    """Write z's gradient into the last channels of `dqkvz`, laid out as `qkvz`.

    Returns: the gradients of o, and of the weight (fp32).
    """
    batch, tokens, heads, dim = o_BTHV.shape
    assert dqkvz_TBX.stride() == qkvz_TBX.stride()
    z_TBX, dz_TBX = (x[..., -heads * dim :] for x in (qkvz_TBX, dqkvz_TBX))
    o = o_BTHV.contiguous()
    do = torch.empty_like(o)
    blocks = triton.cdiv(batch * tokens * heads, _BLOCK_R)
    shares = o.new_empty(blocks, dim, dtype=torch.float32)
    _gated_norm_backward_kernel[(blocks,)](
        o,
        z_TBX,
        weight_V,
        dout.contiguous(),
        do,
        dz_TBX,
        shares,
        tokens,
        batch,
        z_TBX.stride(0),
        z_TBX.stride(1),
        eps,
        HEADS=heads,
        DIM=dim,
        BLOCK_R=_BLOCK_R,
        num_warps=4,
    )
    return do, shares.sum(0)
