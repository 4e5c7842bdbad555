# mypy: allow-untyped-defs
"""Grouped GEMM: every expert's rows times the expert's matrix, in one launch, in bf16 or FP8.

    out[rows of e] = rows[rows of e] · W[e]ᵀ        (or · W[e], for the gradient of the input)

Each expert's rows are cut into blocks of BLOCK_M rows. A small kernel lists the blocks of all experts on the device, so
the number of blocks needs no host synchronization. The GEMM is a persistent kernel with one program per SM, which
iterates over (row block, BLOCK_N columns) tiles; BLOCK_K inputs are loaded per step, by TMA. The loads of a program's
next tile begin before the last one is written (flattened loop): with an inner dimension of 512 a tile has eight steps
only, and that overlap is what `torch._grouped_mm` lacks (tools/benchmarks/LOG.md).

A block that contains rows of the next expert is computed whole, and only its own rows are stored.

R permuted rows (sorted by expert), E experts, B row blocks, N outputs, K inputs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK_R = 128
# BLOCK_N, num_warps, num_stages
_WIDE, _NARROW = (256, 8, 3), (128, 4, 4)
# BLOCK_K in bytes: one line of the TMA swizzle
_BLOCK_BYTES_K = 128
_BLOCKS_PER_STEP = 256
_INTERPRETED_PROGRAMS = 4


@dataclass(frozen=True)
class RowBlocks:
    """Blocks of at most BLOCK_R rows of one expert, in order; the first `count` entries of the lists are in use.

    Shapes: ends [E], cumulative rows per expert; expert and first row of each block [≥ B]; count [1]; first [E+1], the
        first block of each expert and, at the end, the count; all int32.
    """

    ends_E: Tensor
    expert_B: Tensor
    row_B: Tensor
    count: Tensor
    first_E: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, for autograd's `save_for_backward`."""
        return self.ends_E, self.expert_B, self.row_B, self.count, self.first_E

    @property
    def row_lists(self) -> tuple[Tensor, ...]:
        """The tensors that locate the rows of a block."""
        return self.ends_E, self.expert_B, self.row_B, self.count


@triton.jit
def _list_kernel(
    counts_ptr,
    ends_ptr,
    expert_ptr,
    row_ptr,
    count_ptr,
    first_ptr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS_PER_STEP: tl.constexpr,
):
    expert = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + e, mask=e < EXPERTS, other=0).to(tl.int32)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first_row = tl.sum(tl.where(e < expert, counts, 0), axis=0)
    first = tl.sum(tl.where(e < expert, blocks, 0), axis=0)
    num_blocks = tl.sum(tl.where(e == expert, blocks, 0), axis=0)
    tl.store(ends_ptr + expert, first_row + tl.sum(tl.where(e == expert, counts, 0), axis=0))
    tl.store(first_ptr + expert, first)
    if expert == EXPERTS - 1:
        tl.store(count_ptr, first + num_blocks)
        tl.store(first_ptr + EXPERTS, first + num_blocks)
    for start in range(0, num_blocks, BLOCKS_PER_STEP):
        i = start + tl.arange(0, BLOCKS_PER_STEP)
        tl.store(expert_ptr + first + i, tl.zeros_like(i) + expert, mask=i < num_blocks)
        tl.store(row_ptr + first + i, first_row + i * BLOCK_M, mask=i < num_blocks)


@triton.jit
def _scales(row_scale_ptr, weight_scale_ptr, row, end, expert, BLOCK_M: tl.constexpr):
    r = row + tl.arange(0, BLOCK_M)
    scale = tl.load(row_scale_ptr + r, mask=r < end, other=0.0)
    return (scale * tl.load(weight_scale_ptr + expert))[:, None]


@triton.jit
def _grouped_gemm_kernel(
    rows_desc,
    weight_desc,
    out_desc,
    out_ptr,
    ends_ptr,
    expert_ptr,
    row_ptr,
    count_ptr,
    row_scale_ptr,
    weight_scale_ptr,
    N,
    K,
    TRANSPOSED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_STORE: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    num_column_blocks = tl.cdiv(N, BLOCK_N)
    dtype = out_ptr.dtype.element_ty
    for tile in tl.range(tl.program_id(0), tl.load(count_ptr) * num_column_blocks, NUM_PROGRAMS, flatten=True):
        block = tile // num_column_blocks
        n = (tile % num_column_blocks) * BLOCK_N
        expert = tl.load(expert_ptr + block)
        row = tl.load(row_ptr + block)
        end = tl.load(ends_ptr + expert)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            rows = rows_desc.load([row, k])
            if TRANSPOSED:  # noqa: SIM108  the two are of different types in Triton
                weight = weight_desc.load([expert * K + k, n])
            else:
                weight = weight_desc.load([expert * N + n, k]).T
            acc = tl.dot(rows, weight, acc, input_precision="ieee")
        if row + BLOCK_M <= end:
            if SCALED:
                acc = acc * _scales(row_scale_ptr, weight_scale_ptr, row, end, expert, BLOCK_M)
            if SPLIT_STORE:
                # two stores need half the shared memory; the pipeline stages of the loop need the rest
                left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
                out_desc.store([row, n], left.to(dtype))
                out_desc.store([row, n + BLOCK_N // 2], right.to(dtype))
            else:
                out_desc.store([row, n], acc.to(dtype))
        else:
            if SCALED:
                acc = acc * _scales(row_scale_ptr, weight_scale_ptr, row, end, expert, BLOCK_M)
            r = row + tl.arange(0, BLOCK_M)
            c = n + tl.arange(0, BLOCK_N)
            ptr = out_ptr + r.to(tl.int64)[:, None] * N + c[None, :]
            tl.store(ptr, acc.to(dtype), mask=(r < end)[:, None] & (c < N)[None, :])


def is_tma_aligned(rows_RK: Tensor, weight: Tensor) -> bool:
    """Return whether TMA can read and write the operands: rows of a multiple of 16 bytes, whole blocks of inputs."""
    widths = rows_RK.shape[1], *weight.shape[1:]
    has_whole_blocks = rows_RK.shape[1] * rows_RK.element_size() % _BLOCK_BYTES_K == 0
    return rows_RK.shape[0] > 0 and has_whole_blocks and all(width % 16 == 0 for width in widths)


def row_blocks(rows_per_expert_E: Tensor, rows: int) -> RowBlocks:
    """List the row blocks of all experts for `rows` rows in total, without host synchronization."""
    experts = rows_per_expert_E.shape[0]
    new = lambda size: rows_per_expert_E.new_empty(size, dtype=torch.int32)
    # the last block of each expert may be partly filled
    capacity = rows // BLOCK_R + experts
    row_lists = RowBlocks(new(experts), new(capacity), new(capacity), new(1), new(experts + 1))
    _list_kernel[(experts,)](
        rows_per_expert_E,
        *row_lists.tensors,
        EXPERTS=experts,
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_M=BLOCK_R,
        BLOCKS_PER_STEP=_BLOCKS_PER_STEP,
    )
    return row_lists


def grouped_gemm(
    rows_RK: Tensor,
    weight: Tensor,
    blocks: RowBlocks,
    *,
    transposed: bool = False,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Multiply each expert's rows with its matrix. Operands must be contiguous and satisfy `fits`.

    Shapes: rows [R,K]; weight [E,N,K], or [E,K,N] if `transposed`; scales of e4m3 operands: rows [R], experts [E].
    Returns: [R,N], in bf16 where scaled.
    """
    inputs, rows = rows_RK.shape[1], rows_RK.shape[0]
    outputs = weight.shape[2 if transposed else 1]
    block_n, warps, stages = _WIDE if outputs > _NARROW[0] else _NARROW
    split_store = block_n > _NARROW[0]
    block_k = _BLOCK_BYTES_K // rows_RK.element_size()
    out = rows_RK.new_empty(rows, outputs, dtype=torch.bfloat16 if scales else None)
    row_scale, weight_scale = scales or (None, None)
    # a compile-time constant, the same for every number of rows
    grid_size = num_programs(rows_RK.device)
    _grouped_gemm_kernel[(grid_size,)](
        tma_descriptor(rows_RK, BLOCK_R, block_k),
        tma_descriptor(weight.flatten(0, 1), *((block_k, block_n) if transposed else (block_n, block_k))),
        tma_descriptor(out, BLOCK_R, block_n // 2 if split_store else block_n),
        out,
        *blocks.row_lists,
        row_scale,
        weight_scale,
        outputs,
        inputs,
        TRANSPOSED=transposed,
        SCALED=scales is not None,
        BLOCK_M=BLOCK_R,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SPLIT_STORE=split_store,
        NUM_PROGRAMS=grid_size,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def num_programs(device: torch.device) -> int:
    """Return the number of SMs, which is the grid size of a persistent kernel."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def tma_descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Return the TMA descriptor of a matrix in tiles of rows × columns."""
    assert x.is_contiguous()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])
