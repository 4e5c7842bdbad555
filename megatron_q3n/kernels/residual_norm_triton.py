# mypy: allow-untyped-defs
"""Zero-centered RMSNorm of the residual stream, fused with the accumulation of its gradients in the backward pass.

    y = x · s · (1 + w)        s = rsqrt(mean(x²) + ε)                          (arXiv 1910.07467, eq. 4)
    dx = s · (u - x · s² · mean(u · x)) + dresidual        u = (Σ_i dy_i) · (1 + w)
    dw = Σ_t (Σ_i dy_i) · x · s

Up to four consumers read the normed tokens, and the residual stream continues. Autograd would accumulate their
gradients pairwise, with three passes over the stream for each pair; here all are read once and added in fp32.

Launch geometry: forward one program per token row, BLOCK_H ≥ H columns. Backward one program per ROWS tokens, one row
at a time, with STAGES of software pipelining; each program writes a partial sum of dw, and the partial sums are added
in a fixed order. T tokens, H width.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_CONSUMERS = 4
# H200, 16,384 tokens of 2,048: forward 0.037 ms, backward with dresidual and 1, 2, 4 consumers 0.088, 0.102, 0.134
# (an addition alone 0.053); other values of ROWS, warps and STAGES are up to 5 % slower
_FORWARD_WARPS = 4
_BACKWARD = {"ROWS": 16, "STAGES": 2, "num_warps": 8}


@triton.jit
def _residual_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr):
    h, t = tl.arange(0, BLOCK_H), tl.program_id(0).to(tl.int64)
    column_mask = h < WIDTH
    weight = 1 + tl.load(weight_ptr + h, mask=column_mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + t * WIDTH + h, mask=column_mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps) * weight
    tl.store(out_ptr + t * WIDTH + h, y.to(out_ptr.dtype.element_ty), mask=column_mask)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _residual_norm_backward_kernel(
    x_ptr,
    weight_ptr,
    dresidual_ptr,
    d0_ptr,
    d1_ptr,
    d2_ptr,
    d3_ptr,
    dx_ptr,
    dweight_ptr,
    tokens,
    eps,
    NUM_CONSUMERS: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    h = tl.arange(0, BLOCK_H)
    column_mask = h < WIDTH
    weight = 1 + tl.load(weight_ptr + h, mask=column_mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_H,), tl.float32)
    for index in tl.range(0, ROWS, num_stages=STAGES):
        t = (tl.program_id(0) * ROWS + index).to(tl.int64)
        offset, mask = t * WIDTH + h, column_mask & (t < tokens)
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(d0_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if NUM_CONSUMERS > 1:
            d += tl.load(d1_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if NUM_CONSUMERS > 2:
            d += tl.load(d2_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if NUM_CONSUMERS > 3:
            d += tl.load(d3_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        dunit = d * weight
        squares, dot = tl.reduce((x * x, dunit * x), 0, _add_pairs)
        scale = tl.rsqrt(squares / WIDTH + eps)
        dweight += d * x * scale
        dx = scale * (dunit - x * (scale * scale * dot / WIDTH))
        if HAS_DRESIDUAL:
            dx += tl.load(dresidual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + tl.program_id(0) * WIDTH + h, dweight, mask=column_mask)


def residual_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) · (1 + weight) [T,H] in x's dtype."""
    tokens, width = x_TH.shape
    out = torch.empty_like(x_TH)
    _residual_norm_kernel[(tokens,)](x_TH, weight_H, out, eps, **_blocks(width), num_warps=_FORWARD_WARPS)
    return out


def residual_norm_backward(
    x_TH: Tensor, weight_H: Tensor, eps: float, dresidual_TH: Tensor | None, dnormed: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, that of the residual stream included, and of the weight (fp32).

    Shapes: all [T,H] and contiguous; `dnormed` has one tensor per consumer, 1 to MAX_CONSUMERS.
    """
    tokens, width = x_TH.shape
    num_programs = triton.cdiv(tokens, _BACKWARD["ROWS"])
    dx = torch.empty_like(x_TH)
    partial_dweight = x_TH.new_empty(num_programs, width, dtype=torch.float32)
    padded_dnormed = [*dnormed, *[None] * (MAX_CONSUMERS - len(dnormed))]
    _residual_norm_backward_kernel[(num_programs,)](
        x_TH,
        weight_H,
        dresidual_TH,
        *padded_dnormed,
        dx,
        partial_dweight,
        tokens,
        eps,
        NUM_CONSUMERS=len(dnormed),
        HAS_DRESIDUAL=dresidual_TH is not None,
        **_blocks(width),
        **_BACKWARD,
    )
    return dx, partial_dweight.sum(0)


def _blocks(width: int) -> dict[str, int]:
    return {"WIDTH": width, "BLOCK_H": triton.next_power_of_2(width)}
