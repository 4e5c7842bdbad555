# mypy: allow-untyped-defs
"""FP8 (e4m3) quantization with one scale per row, fused into the kernels that produce the rows.

    scale = the smallest power of two with max|x| / scale ≤ 448        q = e4m3(x / scale)

FP8 grouped GEMMs take one scale per row of the left operand and one per expert matrix of the right one. A separate pass
over the permuted rows would, by estimate, cost what FP8 saves. So rows are quantized where they are written: when a
token is copied to its experts (once per token, not once per copy), and when the activation or its gradient is computed.
Row scales are powers of two: as exact as any scale for a floating-point format, and rows can be rescaled to a common
scale later without a second rounding (`fp8_wgrad_triton.py`). Weights are quantized once per step, as they are for the
forward GEMM and transposed for the input gradient's, since FP8 GEMMs need the summed dimension last in both operands.

Launch geometry: scatter, one program per token; SwiGLU, BLOCK_R rows × BLOCK_F ≥ F columns; weights, tiles of
BLOCK_N × BLOCK_K of one expert.

T tokens, TOPK copies of each, R permuted rows, H width, F expert width, E experts, N outputs, K inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

E4M3 = torch.float8_e4m3fn
QuantizedWeight = tuple[Tensor, Tensor, Tensor]
# largest value of e4m3: 1.75 · 2⁸
_LARGEST = tl.constexpr(448.0)
# lower bound of the maximum, so that rows of zeros have a scale
_SMALLEST = tl.constexpr(1e-12)
_AMAX_BLOCK = 16384


@triton.jit
def _power_of_two_scale(x, axis: tl.constexpr):
    """Return the smallest power of two that scales all magnitudes to at most 448, computed from the exponent bits."""
    largest = tl.maximum(tl.max(tl.abs(x), axis=axis), _SMALLEST)
    # rounds the exponent up where the mantissa exceeds 1.75
    exponent = (largest.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23
    scale = ((exponent - 8) << 23).to(tl.float32, bitcast=True)
    # the scale of a row that is not finite is not finite either
    return tl.where(largest < float("inf"), scale, largest)


@triton.jit
def _inverse(scale):
    """Return the reciprocal of a power of two, exactly."""
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
    KEEP_TOKENS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    x = tl.load(x_ptr + t * WIDTH + h, mask=h < WIDTH, other=0.0).to(tl.float32)
    scale = _power_of_two_scale(x, 0)
    quantized = (x * _inverse(scale)).to(out_ptr.dtype.element_ty)
    if KEEP_TOKENS:
        tl.store(token_ptr + t * WIDTH + h, quantized, mask=h < WIDTH)
    for slot in tl.static_range(TOPK):
        row = tl.load(row_ptr + t * TOPK + slot).to(tl.int64)
        tl.store(out_ptr + row * WIDTH + h, quantized, mask=h < WIDTH)
        tl.store(scale_ptr + row, scale)


@triton.jit
def _swiglu_kernel(
    gate_up_ptr,
    weight_ptr,
    quantized_ptr,
    scale_ptr,
    rows,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    mask = (r < rows)[:, None] & (f < WIDTH)[None, :]
    offset = r[:, None] * (2 * WIDTH) + f[None, :]
    gate = tl.load(gate_up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + offset + WIDTH, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    y = gate * tl.sigmoid(gate) * up * weight
    scale = _power_of_two_scale(y, 1)
    tl.store(scale_ptr + r, scale, mask=r < rows)
    quantized = (y * _inverse(scale)[:, None]).to(quantized_ptr.dtype.element_ty)
    tl.store(quantized_ptr + r[:, None] * WIDTH + f[None, :], quantized, mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    gate_up_ptr,
    weight_ptr,
    dout_ptr,
    quantized_ptr,
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
    offset = r[:, None] * (2 * WIDTH) + f[None, :]
    gate = tl.load(gate_up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + offset + WIDTH, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    dout = tl.load(dout_ptr + r[:, None] * WIDTH + f[None, :], mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dweight_ptr + r, tl.sum(dout * silu * up, axis=1), mask=r < rows)
    d = dout * weight
    dgate, dup = d * up * sigmoid * (1 + gate - silu), d * silu
    fp8 = quantized_ptr.dtype.element_ty
    scale = tl.maximum(_power_of_two_scale(dgate, 1), _power_of_two_scale(dup, 1))
    inverse = _inverse(scale)[:, None]
    tl.store(scale_ptr + r, scale, mask=r < rows)
    tl.store(quantized_ptr + offset, (dgate * inverse).to(fp8), mask=mask)
    tl.store(quantized_ptr + offset + WIDTH, (dup * inverse).to(fp8), mask=mask)


@triton.jit
def _amax_kernel(w_ptr, amax_ptr, size, BLOCK: tl.constexpr):
    """Update an expert's maximum magnitude, initially zero, with that of one block."""
    expert = tl.program_id(1).to(tl.int64)
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + expert * size + offset, mask=offset < size, other=0.0).to(tl.float32)
    tl.atomic_max(amax_ptr + expert, tl.max(tl.abs(w), axis=0), sem="relaxed")


@triton.jit
def _quantize_weight_kernel(
    w_ptr, amax_ptr, fp8_ptr, transposed_ptr, scale_ptr, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Write [N,K] and its transpose [K,N], divided by the expert's scale, and the scale."""
    expert = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (n < N)[:, None] & (i < K)[None, :]
    offset = expert * N * K + n[:, None] * K + i[None, :]
    w = tl.load(w_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.load(amax_ptr + expert), _SMALLEST) / _LARGEST
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_ptr + expert, scale)
    fp8 = (w / scale).to(fp8_ptr.dtype.element_ty)
    tl.store(fp8_ptr + offset, fp8, mask=mask)
    offset = expert * N * K + i[:, None] * N + n[None, :]
    tl.store(transposed_ptr + offset, tl.trans(fp8), mask=(i < K)[:, None] & (n < N)[None, :])


def scatter_quantized(x_TH: Tensor, row_TK: Tensor, *, keep_tokens: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each token and copy it to its rows.

    Returns: rows [R,H] in e4m3, their scales [R]; with `keep_tokens` the tokens [T,H] in e4m3, else the rows again.
    """
    tokens, width = x_TH.shape
    rows = row_TK.numel()
    out, scale = x_TH.new_empty(rows, width, dtype=E4M3), x_TH.new_empty(rows, dtype=torch.float32)
    tokens_fp8 = torch.empty_like(x_TH, dtype=E4M3) if keep_tokens else out
    _scatter_kernel[(tokens,)](
        x_TH,
        row_TK,
        out,
        scale,
        tokens_fp8,
        WIDTH=width,
        TOPK=row_TK.shape[1],
        BLOCK_H=triton.next_power_of_2(width),
        KEEP_TOKENS=keep_tokens,
        num_warps=8,
    )
    return out, scale, tokens_fp8


def swiglu_quantized(gate_up_RF: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return SiLU(gate) · up · weight [R,F] in e4m3, and the scales [R]."""
    rows, width = gate_up_RF.shape[0], gate_up_RF.shape[1] // 2
    quantized = gate_up_RF.new_empty(rows, width, dtype=E4M3)
    scale = gate_up_RF.new_empty(rows, dtype=torch.float32)
    blocks, grid = _swiglu_blocks(rows, width)
    _swiglu_kernel[grid](gate_up_RF, weight_R, quantized, scale, rows, **blocks)
    return quantized, scale


def swiglu_backward_quantized(gate_up_RF: Tensor, weight_R: Tensor, dout_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of gate|up [R,2F] in e4m3 and its scales [R], and the weights' gradient [R]."""
    rows, width = dout_RF.shape
    quantized, dweight = torch.empty_like(gate_up_RF, dtype=E4M3), torch.empty_like(weight_R)
    scale = gate_up_RF.new_empty(rows, dtype=torch.float32)
    blocks, grid = _swiglu_blocks(rows, width)
    _swiglu_backward_kernel[grid](gate_up_RF, weight_R, dout_RF, quantized, scale, dweight, rows, **blocks)
    return quantized, scale, dweight


def allocate_quantized_weight(weight_ENK: Tensor) -> QuantizedWeight:
    """Allocate the outputs of `quantize_weight`: [E,N,K] in e4m3, its transpose [E,K,N], and the scales [E] of both."""
    experts, outputs, inputs = weight_ENK.shape
    return (
        torch.empty_like(weight_ENK, dtype=E4M3),
        weight_ENK.new_empty(experts, inputs, outputs, dtype=E4M3),
        weight_ENK.new_empty(experts, dtype=torch.float32),
    )


def quantize_weight(weight_ENK: Tensor, destination: QuantizedWeight) -> None:
    """Quantize expert weights for the forward GEMM and, transposed, for the input gradient's."""
    experts, outputs, inputs = weight_ENK.shape
    fp8_ENK, transposed_EKN, scale_E = destination
    amax_E = torch.zeros_like(scale_E)
    _amax_kernel[(triton.cdiv(outputs * inputs, _AMAX_BLOCK), experts)](
        weight_ENK, amax_E, outputs * inputs, BLOCK=_AMAX_BLOCK, num_warps=8
    )
    _quantize_weight_kernel[(triton.cdiv(outputs, 64), triton.cdiv(inputs, 64), experts)](
        weight_ENK, amax_E, fp8_ENK, transposed_EKN, scale_E, outputs, inputs, BLOCK_N=64, BLOCK_K=64
    )


def _swiglu_blocks(rows: int, width: int) -> tuple[dict[str, int], tuple[int]]:
    block_f = triton.next_power_of_2(width)
    block_r = max(1, 4096 // block_f)
    return {"WIDTH": width, "BLOCK_F": block_f, "BLOCK_R": block_r}, (triton.cdiv(rows, block_r),)
