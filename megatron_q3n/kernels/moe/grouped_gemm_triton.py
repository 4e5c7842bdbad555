# mypy: allow-untyped-defs
"""The product of every expert's rows with its own matrix, in one launch, in bf16 or FP8.

out[rows of e] = rows[rows of e] · W[e]ᵀ (or · W[e], for the gradient of the input). Each expert's rows are cut into
blocks; a small kernel lists the blocks of all experts on the device, so that the host never waits to
learn how many there are. As many programs as there are multiprocessors walk over (block, columns) tiles, and the
loads of a program's next tile begin before the last one is written: with an inner dimension of 512 a tile is only
eight steps long, and that overlap is what `torch._grouped_mm` lacks (tools/benchmarks/LOG.md).

A block that reaches into the next expert's rows is computed whole and stored only as far as it is its own.

R rows sorted by expert, E experts, B blocks of rows, N outputs, K inputs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK_R = 128
_WIDE, _NARROW = (256, 8, 3), (128, 4, 4)  # columns, warps, stages
_BLOCK_BYTES_K = 128  # of the inner dimension: one line of the bulk copy engine's swizzle
_LISTED_AT_ONCE = 256
_INTERPRETED_PROGRAMS = 4


@dataclass(frozen=True)
class RowBlocks:
    """Blocks of at most BLOCK_R rows of one expert, in order; `count` of the lists' entries are in use.

    Shapes: ends [E], the row behind each expert's last; expert and first row of each block [≥ B]; count [1]; first
        [E+1], each expert's first block and, at the end, the count; all int32.
    """

    ends_E: Tensor
    expert_B: Tensor
    row_B: Tensor
    count: Tensor
    first_E: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it, for autograd to keep."""
        return self.ends_E, self.expert_B, self.row_B, self.count, self.first_E

    @property
    def listed(self) -> tuple[Tensor, ...]:
        """What it takes to find a block's rows."""
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
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    expert = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + e, mask=e < EXPERTS, other=0).to(tl.int32)
    blocks = (counts + ROWS - 1) // ROWS
    first_row = tl.sum(tl.where(e < expert, counts, 0), axis=0)
    first = tl.sum(tl.where(e < expert, blocks, 0), axis=0)
    mine = tl.sum(tl.where(e == expert, blocks, 0), axis=0)
    tl.store(ends_ptr + expert, first_row + tl.sum(tl.where(e == expert, counts, 0), axis=0))
    tl.store(first_ptr + expert, first)
    if expert == EXPERTS - 1:
        tl.store(count_ptr, first + mine)
        tl.store(first_ptr + EXPERTS, first + mine)
    for start in range(0, mine, AT_ONCE):
        i = start + tl.arange(0, AT_ONCE)
        tl.store(expert_ptr + first + i, tl.zeros_like(i) + expert, mask=i < mine)
        tl.store(row_ptr + first + i, first_row + i * ROWS, mask=i < mine)


@triton.jit
def _scales(row_scale_ptr, weight_scale_ptr, row, end, expert, ROWS: tl.constexpr):
    r = row + tl.arange(0, ROWS)
    scale = tl.load(row_scale_ptr + r, mask=r < end, other=0.0)
    return (scale * tl.load(weight_scale_ptr + expert))[:, None]


@triton.jit
def _product_kernel(
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
    TURNED: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALVES: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    across = tl.cdiv(N, COLUMNS)
    element = out_ptr.dtype.element_ty
    for tile in tl.range(tl.program_id(0), tl.load(count_ptr) * across, PROGRAMS, flatten=True):
        block = tile // across
        n = (tile % across) * COLUMNS
        expert = tl.load(expert_ptr + block)
        row = tl.load(row_ptr + block)
        end = tl.load(ends_ptr + expert)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, K, BLOCK_K):
            rows = rows_desc.load([row, k])
            if TURNED:  # noqa: SIM108 - of different types, as Triton sees it
                weight = weight_desc.load([expert * K + k, n])
            else:
                weight = weight_desc.load([expert * N + n, k]).T
            total = tl.dot(rows, weight, total, input_precision="ieee")
        if row + ROWS <= end:
            if SCALED:
                total = total * _scales(row_scale_ptr, weight_scale_ptr, row, end, expert, ROWS)
            if HALVES:
                # in two stores, which need half the shared memory; the stages of the loop need the rest
                left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
                out_desc.store([row, n], left.to(element))
                out_desc.store([row, n + COLUMNS // 2], right.to(element))
            else:
                out_desc.store([row, n], total.to(element))
        else:
            if SCALED:
                total = total * _scales(row_scale_ptr, weight_scale_ptr, row, end, expert, ROWS)
            r = row + tl.arange(0, ROWS)
            c = n + tl.arange(0, COLUMNS)
            place = out_ptr + r.to(tl.int64)[:, None] * N + c[None, :]
            tl.store(place, total.to(element), mask=(r < end)[:, None] & (c < N)[None, :])


def fits(rows_RK: Tensor, weight: Tensor) -> bool:
    """Whether there is something that the bulk copy engine can read and write: rows of whole 16 bytes, whole blocks
    of inputs."""
    widths = rows_RK.shape[1], *weight.shape[1:]
    whole = rows_RK.shape[1] * rows_RK.element_size() % _BLOCK_BYTES_K == 0
    return rows_RK.shape[0] > 0 and whole and all(width % 16 == 0 for width in widths)


def row_blocks(rows_per_expert_E: Tensor, rows: int) -> RowBlocks:
    """List the blocks of `rows` rows, of which each expert has its number; without waiting for the device."""
    experts = rows_per_expert_E.shape[0]
    new = lambda size: rows_per_expert_E.new_empty(size, dtype=torch.int32)
    room = rows // BLOCK_R + experts  # each expert's last block may be partly filled
    listed = RowBlocks(new(experts), new(room), new(room), new(1), new(experts + 1))
    _list_kernel[(experts,)](
        rows_per_expert_E,
        *listed.tensors,
        EXPERTS=experts,
        BLOCK_E=triton.next_power_of_2(experts),
        ROWS=BLOCK_R,
        AT_ONCE=_LISTED_AT_ONCE,
    )
    return listed


def grouped_product(
    rows_RK: Tensor,
    weight: Tensor,
    blocks: RowBlocks,
    *,
    turned: bool = False,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Multiply. Operands must fit (`fits`), contiguous.

    Shapes: rows [R,K]; weight [E,N,K], or [E,K,N] if `turned`; scales of e4m3 operands: of rows [R] and experts [E].
    Returns: [R,N], in bf16 where scaled.
    """
    inputs, rows = rows_RK.shape[1], rows_RK.shape[0]
    outputs = weight.shape[2 if turned else 1]
    columns, warps, stages = _WIDE if outputs > _NARROW[0] else _NARROW
    halves = columns > _NARROW[0]
    block_k = _BLOCK_BYTES_K // rows_RK.element_size()
    out = rows_RK.new_empty(rows, outputs, dtype=torch.bfloat16 if scales else None)
    row_scale, weight_scale = scales or (None, None)
    # a constant of the kernel: not one for every number of rows
    walking = programs(rows_RK.device)
    _product_kernel[(walking,)](
        tiles(rows_RK, BLOCK_R, block_k),
        tiles(weight.flatten(0, 1), *((block_k, columns) if turned else (columns, block_k))),
        tiles(out, BLOCK_R, columns // 2 if halves else columns),
        out,
        *blocks.listed,
        row_scale,
        weight_scale,
        outputs,
        inputs,
        TURNED=turned,
        SCALED=scales is not None,
        ROWS=BLOCK_R,
        COLUMNS=columns,
        BLOCK_K=block_k,
        HALVES=halves,
        PROGRAMS=walking,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def programs(device: torch.device) -> int:
    """Return as many programs as there are multiprocessors."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe a matrix to the bulk copy engine, cut into tiles."""
    assert x.is_contiguous()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])
