"""Products of a few rows, with what stands around them: RMSNorm before, a residual after, several weights at once.

In decoding, one to some five rows meet a weight of a few megabytes, which lies in the GPU's cache: the work is
a microsecond, and what is paid for is the launch, and a library's tiles for hundreds of rows. Here a norm
and the products that read it are one launch, so is a product and the sum it is added to, and so are
the draft layer's two norms, their concatenation and its projection. Without gradients, on one rank.

The norm's output is rounded to the weights' format as a norm by itself would store it, and the products
are added up in fp32: what differs from the composed form is the order of the sums, and one rounding
less where something is added.

Shapes: R rows, X and Y widths of the inputs, K = X + Y columns of a weight, N and M rows of weights.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels import registry

OPERATION = "products of a few rows"
# Most rows for which one launch of ours was faster than the library's norm, products and sum (H200, 2026-11-23, the
# table of tools/benchmarks/bench_kernels.py --only rows). Multiply-adds by rows, without tensor cores, come to about 4.6 T/s, so
# from some rows on they outweigh the launches. Of the library's time ours took with up to 1,024 columns 0.47-0.85 at 5
# rows (1.02 for 4 M elements), 0.80-1.34 at 8; with more, whose rows are several pieces, 0.65-0.71 at 3, 1.04-1.28 at 5
_MOST_ROWS, _MOST_ROWS_OF_WIDE, _WIDE = 5, 3, 1024
# (K, N) of the released model's weights that are slower before that: into the residual stream 1.09 at one row; q|k|v
# of attention 0.77 at one, 1.16 at 3; the head 0.94 and 1.33
MOST_ROWS_OF = {(4096, 2048): 0, (2048, 9216): 1, (2048, 151936): 1}


@dataclass(frozen=True)
class RowNorm:
    """RMSNorm over a row, times `offset` + weight [X]: 1 where it is zero-centered."""

    weight_X: Tensor
    eps: float
    offset: float = 1.0


@dataclass(frozen=True)
class Rows:
    """An input [R,X], contiguous along X, and the norm it goes through, if any."""

    x_RX: Tensor
    norm: RowNorm | None = None


@dataclass(frozen=True)
class Products:
    """What came of the rows: `out` [R,N], `beside` [R,M] by the second weight, `normed` [R,X] the first input's."""

    out_RN: Tensor
    beside_RM: Tensor | None = None
    normed_RX: Tensor | None = None


def fits(rows: int, weight_NK: Tensor) -> bool:
    """Whether the fused kernel is the faster way for so many rows and a weight of this size."""
    num_rows, columns = weight_NK.shape
    most = _MOST_ROWS if columns <= _WIDE else _MOST_ROWS_OF_WIDE
    return rows <= MOST_ROWS_OF.get((columns, num_rows), most)


def serves(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether `few_rows` is the way for an input [...,X] and these weights, as they are and where they are."""
    if torch.is_grad_enabled() or not registry.is_fused(OPERATION, x):
        return False
    rows = x.numel() // x.shape[-1]
    return all(
        weight is not None
        and type(weight) in (Tensor, torch.nn.Parameter)  # not a quantised one
        and weight.dtype == x.dtype
        and fits(rows, weight)
        for weight in weights
    )


def few_rows(
    rows: Rows,
    weight_NK: Tensor,
    *,
    then: Rows | None = None,
    beside_MK: Tensor | None = None,
    sum_RN: Tensor | None = None,
    keeps: bool = False,
    wide: bool = False,
    fused: bool | None = None,
) -> Products:
    """Multiply rows with a weight.

    `then` is an input whose columns [R,Y] follow the first's, `beside_MK` a second weight for the same input,
    `sum_RN` is added to the first product, `keeps` hands out the normed rows, `wide` leaves the products in fp32.
    `fused` forces the choice that `choices` makes otherwise.
    """
    if not registry.is_fused(OPERATION, rows.x_RX, fused):
        return composed_few_rows(rows, weight_NK, then, beside_MK, sum_RN, keeps, wide)
    from megatron_q3n.kernels.decode import gemm_triton as kernel  # late: Triton

    return kernel.few_rows(rows, weight_NK, then, beside_MK, sum_RN, keeps, wide)


def composed_few_rows(
    rows: Rows,
    weight_NK: Tensor,
    then: Rows | None,
    beside_MK: Tensor | None,
    sum_RN: Tensor | None,
    keeps: bool,
    wide: bool,
) -> Products:
    """Do it from torch operations."""
    normed = _normed(rows)
    x = normed if then is None else torch.cat([normed, _normed(then)], -1)
    if wide:
        x, weight_NK = _wide(x), _wide(weight_NK)
        beside_MK = None if beside_MK is None else _wide(beside_MK)
    out = F.linear(x, weight_NK)
    beside = None if beside_MK is None else F.linear(x, beside_MK)
    return Products(out if sum_RN is None else sum_RN + out, beside, normed if keeps else None)


def _normed(rows: Rows) -> Tensor:
    x_RX, norm = rows.x_RX, rows.norm
    if norm is None:
        return x_RX
    wide = _wide(x_RX)
    scale = norm.offset + norm.weight_X.to(wide.dtype)
    return F.rms_norm(wide, wide.shape[-1:], scale, norm.eps).to(x_RX.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
