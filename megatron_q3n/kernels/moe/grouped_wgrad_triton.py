# mypy: allow-untyped-defs
"""Grouped weight-gradient GEMM of all experts in one launch, accumulated directly into the fp32 main gradient.

    dW[e] += dY[rows of e]ᵀ · X[rows of e]

`torch._grouped_mm` gives the same product in bf16, which must then be read and added to the fp32 buffer: 10 bytes per
weight of additional traffic, which for hundreds of small experts costs as much as the product itself.

Launch geometry: persistent kernel, `_PROGRAMS_PER_SM` programs per SM, each iterates over tiles of BLOCK_N outputs ×
BLOCK_K inputs of one expert. A tile is the sum over the expert's rows in blocks of BLOCK_R: the main loop over whole
blocks, the rest masked, so no other expert's row is added. Blocks are loaded by TMA (Hopper and newer), which leaves
the registers to the accumulators; of two programs on an SM one multiplies while the other reads or writes its fp32
tile. An expert without rows leaves its gradient unchanged (or zero, when not accumulating).

R permuted rows, E experts, N outputs, K inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# BLOCK_R, BLOCK_N, BLOCK_K, num_warps, num_stages. Measured on an H200 for 163,840 rows, 128 experts of 1024 × 2048:
# writing 1.19 ms (of which 0.26 ms is the traffic of the gradient itself); tiles of 128 × 256 with one program per SM
# 1.23 ms.
_TILE = (64, 128, 128, 4, 3)
_PROGRAMS_PER_SM, _INTERPRETED_PROGRAMS = 2, 3


@triton.jit
def _grouped_wgrad_kernel(
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
    num_tiles = tl.cdiv(N, BLOCK_N) * tiles_k
    for tile in tl.range(tl.program_id(0), num_tiles * experts, tl.num_programs(0)):
        expert, tile_of_expert = tile // num_tiles, tile % num_tiles
        first_n, first_k = (tile_of_expert // tiles_k) * BLOCK_N, (tile_of_expert % tiles_k) * BLOCK_K
        end = tl.load(ends_ptr + expert)
        start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        whole_end = start + (end - start) // BLOCK_R * BLOCK_R
        for row in range(start, whole_end, BLOCK_R):
            dy = dy_desc.load([row, first_n])
            x = x_desc.load([row, first_k])
            acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
        if whole_end < end:
            # the block contains rows of the next expert: both operands are masked, since 0 · inf is not zero
            row_mask = (whole_end + tl.arange(0, BLOCK_R) < end)[:, None]
            dy = tl.where(row_mask, dy_desc.load([whole_end, first_n]), 0.0)
            x = tl.where(row_mask, x_desc.load([whole_end, first_k]), 0.0)
            acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
        n, k = first_n + tl.arange(0, BLOCK_N), first_k + tl.arange(0, BLOCK_K)
        ptr = out_ptr + expert.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
        mask = (n < N)[:, None] & (k < K)[None, :]
        if ACCUMULATE:
            if end > start:
                acc += tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
                tl.store(ptr, acc.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(ptr, acc.to(out_ptr.dtype.element_ty), mask=mask)


def grouped_weight_gradient(dy_RN: Tensor, x_RK: Tensor, ends_E: Tensor, out_ENK: Tensor, accumulate: bool) -> None:
    """Compute every expert's weight gradient into `out`, or add it if `accumulate`.

    Shapes: dY [R,N], X [R,K] contiguous, rows of a multiple of 16 bytes; ends [E] int32, cumulative rows per expert.
    """
    (outputs, inputs), experts = (dy_RN.shape[1], x_RK.shape[1]), out_ENK.shape[0]
    assert out_ENK.is_contiguous()
    block_r, block_n, block_k, warps, stages = _TILE
    num_tiles = experts * triton.cdiv(outputs, block_n) * triton.cdiv(inputs, block_k)
    _grouped_wgrad_kernel[(min(_num_programs(dy_RN.device), num_tiles),)](
        _descriptor(dy_RN, block_r, block_n),
        _descriptor(x_RK, block_r, block_k),
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


def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return _PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    assert x.is_contiguous()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])
