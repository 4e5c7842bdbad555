"""Decode GEMM: skinny GEMM with a fused RMSNorm prologue and residual epilogue, for one to some five input rows.

    out = concat(rms_norm(x), rms_norm(y)) · Wᵀ + residual        second_out = rms_norm(x) · W2ᵀ

Each term but the first is optional. When decoding, a few rows are multiplied with a weight of a few megabytes in the L2
cache: the multiply-adds take about a microsecond, and the time goes to kernel launches and to the library's tiles for
hundreds of rows. So a norm and the GEMMs that consume it are one launch; so are a GEMM and its residual addition, and
the two norms, the concatenation and the projection of the MTP layer. Without gradients, on one rank.

The normed rows are rounded to the dtype of the weights, as a norm of its own would store them, and products are
accumulated in fp32. The result differs from the reference in the order of the sums, and by one rounding less where a
residual is added.

Shapes: R rows, X and Y widths of the inputs, K = X + Y columns of a weight, N and M output widths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels.decode.operands import GemmInput, GemmOutput
from megatron_q3n.kernels.norms import accumulation_dtype

# Most rows for which one fused launch was faster than the library's norm, GEMM and addition (H200, 2026-11-23, the
# table of tools/benchmarks/bench_kernels.py --only decode_gemm). Multiply-adds by rows, without tensor cores, reach
# about 4.6 T/s, so from some rows on they outweigh the launches. Time relative to the library: with up to 1,024
# columns 0.47-0.85 at 5 rows (1.02 for 4 M elements), 0.80-1.34 at 8; with more columns, whose rows take several
# blocks, 0.65-0.71 at 3, 1.04-1.28 at 5.
_MAX_ROWS, _MAX_ROWS_WIDE, _WIDE_COLUMNS = 5, 3, 1024
# (K, N) of the released model's weights for which the fused kernel is slower earlier: the output projection 1.09 at
# one row; q|k|v of attention 0.77 at one, 1.16 at 3; the LM head 0.94 and 1.33
MAX_ROWS_BY_SHAPE = {(4096, 2048): 0, (2048, 9216): 1, (2048, 151936): 1}


def max_rows(weight_NK: Tensor) -> int:
    """Return up to how many rows the fused kernel is the faster path for this weight shape."""
    out_width, columns = weight_NK.shape
    limit = _MAX_ROWS if columns <= _WIDE_COLUMNS else _MAX_ROWS_WIDE
    return MAX_ROWS_BY_SHAPE.get((columns, out_width), limit)


def decode_gemm(
    first: GemmInput,
    weight_NK: Tensor,
    *,
    second: GemmInput | None = None,
    second_weight_MK: Tensor | None = None,
    residual_RN: Tensor | None = None,
    returns_normed: bool = False,
    fp32_output: bool = False,
    fused: bool = False,
) -> GemmOutput:
    """Multiply a few rows with a weight, with an optional norm prologue and residual epilogue.

    `second` is an input whose columns [R,Y] follow those of the first; `second_weight_MK` multiplies the same input;
    `residual_RN` is added to the first product; `returns_normed` also returns the normed rows of the first input;
    `fp32_output` keeps the products in fp32. `fused` runs the Triton kernel instead of the reference.
    """
    if not fused:
        return decode_gemm_reference(
            first, weight_NK, second, second_weight_MK, residual_RN, returns_normed, fp32_output
        )
    from megatron_q3n.kernels.decode import gemm_triton as kernel  # late: Triton

    return kernel.decode_gemm(first, weight_NK, second, second_weight_MK, residual_RN, returns_normed, fp32_output)


def decode_gemm_reference(
    first: GemmInput,
    weight_NK: Tensor,
    second: GemmInput | None,
    second_weight_MK: Tensor | None,
    residual_RN: Tensor | None,
    returns_normed: bool,
    fp32_output: bool,
) -> GemmOutput:
    """Compute the decode GEMM from torch operations; arguments as `decode_gemm`."""
    normed = _apply_norm(first)
    x = normed if second is None else torch.cat([normed, _apply_norm(second)], -1)
    if fp32_output:
        dtype = accumulation_dtype(x)
        x, weight_NK = x.to(dtype), weight_NK.to(dtype)
        second_weight_MK = None if second_weight_MK is None else second_weight_MK.to(dtype)
    out = F.linear(x, weight_NK)
    second_out = None if second_weight_MK is None else F.linear(x, second_weight_MK)
    out = out if residual_RN is None else residual_RN + out
    return GemmOutput(out, second_out, normed if returns_normed else None)


def _apply_norm(rows: GemmInput) -> Tensor:
    x_RX, norm = rows.x_RX, rows.norm
    if norm is None:
        return x_RX
    x = x_RX.to(accumulation_dtype(x_RX))
    scale = norm.offset + norm.weight_X.to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], scale, norm.eps).to(x_RX.dtype)
