# mypy: allow-untyped-defs
"""Gated RMSNorm at the output of Gated DeltaNet in one pass: rms_norm(o) · SiLU(z), [B,T,Hv,V] to [T,B,Hv·V].

    y = o · s · (1 + w) · z σ(z)        s = rsqrt(mean(o²) + ε)
    do = s (u - n · mean(u · n))        n = o · s,  u = dy · z σ(z) · (1 + w)

z is read in place, as the last Hv·V channels of the projection's output, and its gradient is written to the same
channels of the projection's gradient, so nothing is sliced, transposed or concatenated.

Launch geometry: one program per BLOCK_R rows, a row being (token, batch row, head) with DIM channels. The gradient of
the weight is one partial sum per program; the partial sums are added in a fixed order.

T tokens, B rows, Hv heads, V head dim (a power of two), X projection channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# rows (token, batch row, head) per program
_BLOCK_R = 32


@triton.jit
def _rows(start, tokens, batch, HEADS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return row indices (t, b, h; h fastest), their mask, their index in [B,T,Hv], and t, b, h."""
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
    r, row_mask, bth_index, t, b, h = _rows(tl.program_id(0) * BLOCK_R, tokens, batch, HEADS, BLOCK_R)
    dim = tl.arange(0, DIM)
    mask = row_mask[:, None]
    o = tl.load(o_ptr + bth_index[:, None] * DIM + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    z_offset = (t * stride_t + b * stride_b + h * DIM)[:, None] + dim[None, :]
    z = tl.load(z_ptr + z_offset, mask=mask, other=0.0).to(tl.float32)
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
    r, row_mask, bth_index, t, b, h = _rows(tl.program_id(0) * BLOCK_R, tokens, batch, HEADS, BLOCK_R)
    dim = tl.arange(0, DIM)
    mask = row_mask[:, None]
    o_offset = bth_index[:, None] * DIM + dim[None, :]
    o = tl.load(o_ptr + o_offset, mask=mask, other=0.0).to(tl.float32)
    z_offset = (t * stride_t + b * stride_b + h * DIM)[:, None] + dim[None, :]
    z = tl.load(z_ptr + z_offset, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + r[:, None] * DIM + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(o * o, axis=1) / DIM + eps)[:, None]
    weight = 1 + tl.load(weight_ptr + dim)[None, :]
    gate = tl.sigmoid(z)
    normed = o * scale
    dz = dout * normed * weight * gate * (1 + z * (1 - gate))
    tl.store(dz_ptr + z_offset, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    dscaled = dout * z * gate
    tl.store(dweight_ptr + tl.program_id(0) * DIM + dim, tl.sum(dscaled * normed, axis=0))
    dnormed = dscaled * weight
    do = scale * (dnormed - normed * (tl.sum(dnormed * normed, axis=1) / DIM)[:, None])
    tl.store(do_ptr + o_offset, do.to(do_ptr.dtype.element_ty), mask=mask)


def gated_norm(o_BTHV: Tensor, qkvz_TBX: Tensor, weight_V: Tensor, eps: float) -> Tensor:
    """Normalize and gate, in the layout of the output projection.

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
    """Write z's gradient into the last channels of `dqkvz`, whose strides are those of `qkvz`.

    Returns: the gradients of o, and of the weight (fp32).
    """
    batch, tokens, heads, dim = o_BTHV.shape
    assert dqkvz_TBX.stride() == qkvz_TBX.stride()
    z_TBX, dz_TBX = (x[..., -heads * dim :] for x in (qkvz_TBX, dqkvz_TBX))
    o = o_BTHV.contiguous()
    do = torch.empty_like(o)
    num_blocks = triton.cdiv(batch * tokens * heads, _BLOCK_R)
    partial_dweight = o.new_empty(num_blocks, dim, dtype=torch.float32)
    _gated_norm_backward_kernel[(num_blocks,)](
        o,
        z_TBX,
        weight_V,
        dout.contiguous(),
        do,
        dz_TBX,
        partial_dweight,
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
    return do, partial_dweight.sum(0)
