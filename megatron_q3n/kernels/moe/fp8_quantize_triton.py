# mypy: allow-untyped-defs
"""FP8 operands for grouped products: each row with a scale of its own (e4m3), made where the row is made.

Grouped FP8 products take one scale per row of the left side and one per expert's matrix of the right
side. A pass of its own over the sorted rows would, by reckoning, cost what FP8 saves; so rows are quantised while
they are written: when a token is copied to its experts (once per token, not once per copy), and when the activation or
its gradient is computed. Rows' scales are powers of two: as exact as any for a floating format, and rows can be brought
to a common scale later without a second rounding (`fp8_wgrad_triton.py`). Weights are quantised once per step, as
they are for the forward product and transposed for the input gradient's: FP8 products want the summed dimension last on
both sides.

T tokens, TOPK copies of each, R rows, H width, F expert width, E experts, N outputs, K inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

E4M3 = torch.float8_e4m3fn
BothWays = tuple[Tensor, Tensor, Tensor]
_LARGEST = tl.constexpr(448.0)  # of e4m3: 1.75 · 2⁸
_SMALLEST = tl.constexpr(1e-12)  # rows of zeros get a scale too
_AMAX_BLOCK = 16384


@triton.jit
def _scale_of(x, axis: tl.constexpr):
    """Return the smallest power of two that brings all magnitudes to 448 at most, by its exponent's bits."""
    largest = tl.maximum(tl.max(tl.abs(x), axis=axis), _SMALLEST)
    exponent = (largest.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23  # one more beyond 1.75
    scale = ((exponent - 8) << 23).to(tl.float32, bitcast=True)
    return tl.where(largest < float("inf"), scale, largest)  # whatever becomes of an infinite row is not finite


@triton.jit
def _inverse(scale):
    """Return one over a power of two."""
    return ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _scatter_kernel(
    x_ptr,
    row_ptr,
    out_ptr,
    scale_ptr,
    token_ptr,
    WIDTH: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    KEEPS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    x = tl.load(x_ptr + t * WIDTH + h, mask=h < WIDTH, other=0.0).to(tl.float32)
    scale = _scale_of(x, 0)
    quantised = (x * _inverse(scale)).to(out_ptr.dtype.element_ty)
    if KEEPS:
        tl.store(token_ptr + t * WIDTH + h, quantised, mask=h < WIDTH)
    for slot in tl.static_range(TOPK):
        row = tl.load(row_ptr + t * TOPK + slot).to(tl.int64)
        tl.store(out_ptr + row * WIDTH + h, quantised, mask=h < WIDTH)
        tl.store(scale_ptr + row, scale)


@triton.jit
def _swiglu_kernel(
    gate_up_ptr,
    weight_ptr,
    quantised_ptr,
    scale_ptr,
    rows,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    mask = (r < rows)[:, None] & (f < WIDTH)[None, :]
    place = r[:, None] * (2 * WIDTH) + f[None, :]
    gate = tl.load(gate_up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + place + WIDTH, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    y = gate * tl.sigmoid(gate) * up * weight
    scale = _scale_of(y, 1)
    tl.store(scale_ptr + r, scale, mask=r < rows)
    quantised = (y * _inverse(scale)[:, None]).to(quantised_ptr.dtype.element_ty)
    tl.store(quantised_ptr + r[:, None] * WIDTH + f[None, :], quantised, mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    gate_up_ptr,
    weight_ptr,
    dout_ptr,
    quantised_ptr,
    scale_ptr,
    dweight_ptr,
    rows,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    mask = (r < rows)[:, None] & (f < WIDTH)[None, :]
    place = r[:, None] * (2 * WIDTH) + f[None, :]
    gate = tl.load(gate_up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + place + WIDTH, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    dout = tl.load(dout_ptr + r[:, None] * WIDTH + f[None, :], mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dweight_ptr + r, tl.sum(dout * silu * up, axis=1), mask=r < rows)
    d = dout * weight
    dgate, dup = d * up * sigmoid * (1 + gate - silu), d * silu
    narrow = quantised_ptr.dtype.element_ty
    scale = tl.maximum(_scale_of(dgate, 1), _scale_of(dup, 1))
    inverse = _inverse(scale)[:, None]
    tl.store(scale_ptr + r, scale, mask=r < rows)
    tl.store(quantised_ptr + place, (dgate * inverse).to(narrow), mask=mask)
    tl.store(quantised_ptr + place + WIDTH, (dup * inverse).to(narrow), mask=mask)


@triton.jit
def _amax_kernel(w_ptr, amax_ptr, size, BLOCK: tl.constexpr):
    """Raise an expert's largest magnitude by a part's; zero to begin with."""
    expert = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + expert * size + place, mask=place < size, other=0.0).to(tl.float32)
    tl.atomic_max(amax_ptr + expert, tl.max(tl.abs(w), axis=0), sem="relaxed")


@triton.jit
def _both_ways_kernel(
    w_ptr, amax_ptr, straight_ptr, turned_ptr, scale_ptr, N, K, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr
):
    """Write [N,K] and its transpose [K,N], divided by the expert's scale, and that."""
    expert = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (n < N)[:, None] & (i < K)[None, :]
    place = expert * N * K + n[:, None] * K + i[None, :]
    w = tl.load(w_ptr + place, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.load(amax_ptr + expert), _SMALLEST) / _LARGEST
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_ptr + expert, scale)
    narrow = (w / scale).to(straight_ptr.dtype.element_ty)
    tl.store(straight_ptr + place, narrow, mask=mask)
    place = expert * N * K + i[:, None] * N + n[None, :]
    tl.store(turned_ptr + place, tl.trans(narrow), mask=(i < K)[:, None] & (n < N)[None, :])


def scatter_quantised(x_TH: Tensor, row_TK: Tensor, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Copy each token to its rows.

    Returns: rows [R,H] in e4m3, their scales [R]; if asked, the tokens [T,H] on the same scales, else the rows again.
    """
    tokens, width = x_TH.shape
    rows = row_TK.numel()
    out, scale = x_TH.new_empty(rows, width, dtype=E4M3), x_TH.new_empty(rows, dtype=torch.float32)
    kept = torch.empty_like(x_TH, dtype=E4M3) if keep else out
    _scatter_kernel[(tokens,)](
        x_TH,
        row_TK,
        out,
        scale,
        kept,
        WIDTH=width,
        TOPK=row_TK.shape[1],
        BLOCK_H=triton.next_power_of_2(width),
        KEEPS=keep,
        num_warps=8,
    )
    return out, scale, kept


def swiglu_quantised(gate_up_RF: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return SiLU(gate) · up · weight [R,F] in e4m3, and the scales [R]."""
    rows, width = gate_up_RF.shape[0], gate_up_RF.shape[1] // 2
    quantised = gate_up_RF.new_empty(rows, width, dtype=E4M3)
    scale = gate_up_RF.new_empty(rows, dtype=torch.float32)
    blocks, grid = _swiglu_blocks(rows, width)
    _swiglu_kernel[grid](gate_up_RF, weight_R, quantised, scale, rows, **blocks)
    return quantised, scale


def swiglu_backward_quantised(gate_up_RF: Tensor, weight_R: Tensor, dout_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of gate|up [R,2F] in e4m3 and its scales [R], and the weights' gradient [R]."""
    rows, width = dout_RF.shape
    quantised, dweight = torch.empty_like(gate_up_RF, dtype=E4M3), torch.empty_like(weight_R)
    scale = gate_up_RF.new_empty(rows, dtype=torch.float32)
    blocks, grid = _swiglu_blocks(rows, width)
    _swiglu_backward_kernel[grid](gate_up_RF, weight_R, dout_RF, quantised, scale, dweight, rows, **blocks)
    return quantised, scale, dweight


def room_for_both_ways(weight_ENK: Tensor) -> BothWays:
    """Allocate what `quantise_both_ways` fills: [E,N,K] in e4m3, its transpose [E,K,N], and the scales [E] of both."""
    experts, outputs, inputs = weight_ENK.shape
    return (
        torch.empty_like(weight_ENK, dtype=E4M3),
        weight_ENK.new_empty(experts, inputs, outputs, dtype=E4M3),
        weight_ENK.new_empty(experts, dtype=torch.float32),
    )


def quantise_both_ways(weight_ENK: Tensor, into: BothWays) -> None:
    """Quantise expert weights for the forward product and for the input gradient's."""
    experts, outputs, inputs = weight_ENK.shape
    straight, turned, scale_E = into
    amax_E = torch.zeros_like(scale_E)
    _amax_kernel[(triton.cdiv(outputs * inputs, _AMAX_BLOCK), experts)](
        weight_ENK, amax_E, outputs * inputs, BLOCK=_AMAX_BLOCK, num_warps=8
    )
    _both_ways_kernel[(triton.cdiv(outputs, 64), triton.cdiv(inputs, 64), experts)](
        weight_ENK, amax_E, straight, turned, scale_E, outputs, inputs, BLOCK_N=64, BLOCK_I=64
    )


def _swiglu_blocks(rows: int, width: int) -> tuple[dict[str, int], tuple[int]]:
    block_f = triton.next_power_of_2(width)
    block_r = max(1, 4096 // block_f)
    return {"WIDTH": width, "BLOCK_F": block_f, "BLOCK_R": block_r}, (triton.cdiv(rows, block_r),)
