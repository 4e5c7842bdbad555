# mypy: allow-untyped-defs
"""Weight gradients of all experts in one launch, added straight into the fp32 main gradient.

dW[e] += dY[rows of e]ᵀ · X[rows of e]. `torch._grouped_mm` gives the same product in bf16, which then
has to be read and added to the fp32 buffer: 10 bytes per weight more traffic, which for hundreds of
small experts costs as much as the product itself.

A tile of one expert is the sum over its rows: the main loop over whole blocks of rows, the rest masked,
so that no neighbour's row is ever added. Blocks arrive by the GPU's bulk copy engine (Hopper and newer), which leaves
the registers to the sums; two programs share a multiprocessor, so that one multiplies while the other reads or writes
its fp32 tile. An expert without rows leaves its gradient as it is (or zero, when not accumulating).

R rows sorted by expert, E experts, N outputs, K inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Rows, outputs, inputs, warps, stages. Measured on an H200 for 163,840 rows, 128 experts of 1024 × 2048: writing 1.19
# ms (of which 0.26 ms is the gradient's own bytes); tiles of 128 × 256 with one program on each multiprocessor 1.23 ms.
_TILE = (64, 128, 128, 4, 3)
_PROGRAMS_EACH, _INTERPRETED_PROGRAMS = 2, 3


@triton.jit
def _kernel(
    dy_desc,
    x_desc,
    out_ptr,
    ends_ptr,
    experts,
    N,
    K,
    ACCUMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_k
    for tile in tl.range(tl.program_id(0), tiles * experts, tl.num_programs(0)):
        expert, within = tile // tiles, tile % tiles
        first_n, first_k = (within // tiles_k) * BLOCK_N, (within % tiles_k) * BLOCK_K
        end = tl.load(ends_ptr + expert)
        start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        whole = start + (end - start) // BLOCK_R * BLOCK_R
        for row in range(start, whole, BLOCK_R):
            dy = dy_desc.load([row, first_n])
            x = x_desc.load([row, first_k])
            total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
        if whole < end:
            # the block reaches into the next expert's rows: both sides are cleared, as 0 · inf is no zero
            mine = (whole + tl.arange(0, BLOCK_R) < end)[:, None]
            dy = tl.where(mine, dy_desc.load([whole, first_n]), 0.0)
            x = tl.where(mine, x_desc.load([whole, first_k]), 0.0)
            total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
        n, k = first_n + tl.arange(0, BLOCK_N), first_k + tl.arange(0, BLOCK_K)
        place = out_ptr + expert.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
        mask = (n < N)[:, None] & (k < K)[None, :]
        if ACCUMULATE:
            if end > start:
                total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
                tl.store(place, total.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(place, total.to(out_ptr.dtype.element_ty), mask=mask)


def grouped_weight_gradient(dy_RN: Tensor, x_RK: Tensor, ends_E: Tensor, out_ENK: Tensor, accumulate: bool) -> None:
    """Compute every expert's weight gradient into `out`, adding to what is there if asked.

    Shapes: dY [R,N], X [R,K] contiguous, rows of a multiple of 16 bytes; ends [E] int32, the row behind each expert's
        last.
    """
    (outputs, inputs), experts = (dy_RN.shape[1], x_RK.shape[1]), out_ENK.shape[0]
    assert out_ENK.is_contiguous()
    block_r, block_n, block_k, warps, stages = _TILE
    tiles = experts * triton.cdiv(outputs, block_n) * triton.cdiv(inputs, block_k)
    _kernel[(min(_programs(dy_RN.device), tiles),)](
        _blocks_of(dy_RN, block_r, block_n),
        _blocks_of(x_RK, block_r, block_k),
        out_ENK,
        ends_E,
        experts,
        outputs,
        inputs,
        ACCUMULATE=accumulate,
        BLOCK_R=block_r,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages if dy_RN.dtype == torch.bfloat16 else 1,
    )


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return _PROGRAMS_EACH * torch.cuda.get_device_properties(device).multi_processor_count


def _blocks_of(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    assert x.is_contiguous()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])
