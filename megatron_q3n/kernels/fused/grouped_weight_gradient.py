"""Weight gradients of all experts in one launch, added straight into the fp32 main gradient.

dW[e] += dY[rows of e]ᵀ · X[rows of e]. `torch._grouped_mm` gives the same product in bf16, which then
has to be read and added to the fp32 buffer: 10 bytes per weight more traffic, which for hundreds of
small experts costs as much as the product itself.

A program owns one tile of one expert and walks its rows: the main loop over whole blocks of rows, the
rest masked, so that no neighbour's row is ever added. An expert without rows leaves its gradient as
it is (or zero, when not accumulating).

R rows sorted by expert, E experts, N outputs, K inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows, outputs, inputs, warps, stages. Two programs fit on one multiprocessor, so that one reads and writes its fp32
# tile while the other multiplies: with one larger program that traffic stands in the way (1.6 against 1.1 ms).
_TILE = (64, 128, 128, 4, 3)


@triton.jit
def _kernel(
    dy_ptr, x_ptr, out_ptr, ends_ptr,
    N: tl.constexpr, K: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    expert = tile // (tiles_n * tiles_k)
    within = tile % (tiles_n * tiles_k)
    n = (within // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (within % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    end = tl.load(ends_ptr + expert)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dy_base = dy_ptr + start.to(tl.int64) * N
    x_base = x_ptr + start.to(tl.int64) * K
    whole = (end - start) // BLOCK_R * BLOCK_R
    for offset in range(0, whole, BLOCK_R):
        rows = offset + r
        dy = tl.load(dy_base + rows[:, None] * N + n[None, :], mask=(n < N)[None, :], other=0.0)
        x = tl.load(x_base + rows[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
    if whole < end - start:
        rows = whole + r
        exists = (rows < end - start)[:, None]
        dy = tl.load(
            dy_base + rows[:, None] * N + n[None, :], mask=exists & (n < N)[None, :], other=0.0
        )
        x = tl.load(
            x_base + rows[:, None] * K + k[None, :], mask=exists & (k < K)[None, :], other=0.0
        )
        total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
    place = out_ptr + expert.to(tl.int64) * (N * K) + n[:, None] * K + k[None, :]
    mask = (n < N)[:, None] & (k < K)[None, :]
    if ACCUMULATE:
        if end > start:
            total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
            tl.store(place, total.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(place, total.to(out_ptr.dtype.element_ty), mask=mask)


def grouped_weight_gradient(
    dy_RN: Tensor,
    x_RK: Tensor,
    ends_E: Tensor,
    out_ENK: Tensor,
    accumulate: bool,
    tile: tuple[int, int, int, int, int] = _TILE,
) -> None:
    """Compute every expert's weight gradient into `out`, adding to what is there if asked.

    Shapes: dY [R,N], X [R,K] contiguous; ends [E] int32, the row behind each expert's last.
    """
    (outputs, inputs), experts = (dy_RN.shape[1], x_RK.shape[1]), out_ENK.shape[0]
    assert dy_RN.is_contiguous()
    assert x_RK.is_contiguous()
    assert out_ENK.is_contiguous()
    block_r, block_n, block_k, warps, stages = tile
    grid = experts * triton.cdiv(outputs, block_n) * triton.cdiv(inputs, block_k)
    _kernel[(grid,)](
        dy_RN, x_RK, out_ENK, ends_E, N=outputs, K=inputs, ACCUMULATE=accumulate,
        BLOCK_R=block_r, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=warps, num_stages=stages if dy_RN.dtype == torch.bfloat16 else 1,
    )  # fmt: skip
