# mypy: allow-untyped-defs
"""Weight gradients of all experts in FP8: what is summed over lies last in both operands, as FP8 products want it.

dW[e] += dY[rows of e]ᵀ · X[rows of e] sums over rows, and rows lie first. So each block of 128 rows of one expert (the
blocks of `grouped_product`) is turned: a piece [C,128], its rows padded with zeros. Rows come with scales of their own,
which cannot stand in front of a sum over rows; they are powers of two (`fp8_quantize_triton.py`), so that bringing all rows of an
expert to the largest one's scale costs no second rounding: only what falls below e4m3's smallest normal number loses
bits, and that is 2⁻¹⁵ of the expert's largest.

Hopper's tensor cores add FP8 products with some 14 bits, which shrinks long sums of one sign. So no sum is longer there
than 2,048 rows, as in the products with weights; an expert with more rows adds the next 2,048 to what it has written.

Reference: DeepSeek-V3 (arXiv 2412.19437), section 3.3, turns rows with scales of 128 × 1 and adds up in fp32 between
them, which takes twice the registers; one scale per expert needs no scaling in between.
Shapes: R rows sorted by expert, B blocks of rows, C columns, E experts, N outputs, K inputs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_q3n.kernels.moe.grouped_gemm_triton import BLOCK_R, RowBlocks, programs, tiles

# On an H200 for 128 experts of 1,280 rows: 2048 columns gathered from 16,384 lines 0.145 ms, 1024 of the rows' own
# 0.104; byte by byte, in 64 columns, 0.173 and 0.125.
_TURNED_COLUMNS, _TURNED_WARPS = 128, 4
_SCALES_AT_ONCE = 1024
# Outputs, inputs, warps, stages. There, 1024 × 2048 written: 0.66 ms (1037 TFLOP/s; in bf16 1.26); three stages 0.69;
# 256 × 128 0.75; two programs of 128 × 128 on each multiprocessor 0.72. Added instead of written: 1.05 ms.
_TILE = (128, 256, 8, 4)
_BLOCKS_AT_ONCE = 16  # of 128 rows, added up by the tensor cores


@dataclass(frozen=True)
class Turned:
    """Rows turned block by block. Shapes: pieces [B·C,128] in e4m3; scale of each expert's [E]."""

    pieces: Tensor
    scale_E: Tensor


@triton.jit
def _line_bytes(x_ptr, scale_ptr, source_ptr, r, end, c, WIDTH, scale):
    """Read rows at their expert's scale, each byte in a word of its own."""
    source = r
    if source_ptr is not None:
        source = tl.load(source_ptr + r, mask=r < end, other=0)
    mask = (r < end)[:, None] & (c < WIDTH)[None, :]
    x = tl.load(x_ptr + source.to(tl.int64)[:, None] * WIDTH + c[None, :], mask=mask, other=0.0)
    # of powers of two, at most 1: exact in fp16 until the result is below all that e4m3 can hold
    share = (tl.load(scale_ptr + r, mask=r < end, other=0.0) / scale).to(tl.float16)
    x = (x.to(tl.float16) * share[:, None]).to(x_ptr.dtype.element_ty)
    return x.to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def _turn_kernel(
    x_ptr,
    scale_ptr,
    source_ptr,
    out_ptr,
    out_scale_ptr,
    ends_ptr,
    expert_ptr,
    row_ptr,
    count_ptr,
    WIDTH,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    block = tl.program_id(0)
    if block < tl.load(count_ptr):
        expert = tl.load(expert_ptr + block)
        first = tl.load(row_ptr + block)
        end = tl.load(ends_ptr + expert)
        start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        largest = tl.zeros((AT_ONCE,), tl.float32)
        for row in range(start, end, AT_ONCE):
            r = row + tl.arange(0, AT_ONCE)
            largest = tl.maximum(largest, tl.load(scale_ptr + r, mask=r < end, other=0.0))
        scale = tl.max(largest, axis=0)
        c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        # four rows make a word of each column, which is turned as one: single bytes would cost four times the traffic
        # in shared memory
        word = tl.arange(0, ROWS // 4)
        r = first + 4 * word
        x = _line_bytes(x_ptr, scale_ptr, source_ptr, r, end, c, WIDTH, scale)
        x |= _line_bytes(x_ptr, scale_ptr, source_ptr, r + 1, end, c, WIDTH, scale) << 8
        x |= _line_bytes(x_ptr, scale_ptr, source_ptr, r + 2, end, c, WIDTH, scale) << 16
        x |= _line_bytes(x_ptr, scale_ptr, source_ptr, r + 3, end, c, WIDTH, scale) << 24
        place = (tl.cast(block, tl.int64) * WIDTH + c)[:, None] * (ROWS // 4) + word[None, :]
        tl.store(out_ptr + place, tl.trans(x), mask=(c < WIDTH)[:, None])
        if (first == start) & (tl.program_id(1) == 0):
            tl.store(out_scale_ptr + expert, scale)


@triton.jit
def _steps(first_ptr, tile, tiles, all_tiles):
    """The blocks of a tile's expert; an expert without rows takes a step too, to be written."""
    expert = tile // tiles
    inside = tile < all_tiles
    first = tl.load(first_ptr + expert, mask=inside, other=0)
    last = tl.load(first_ptr + expert + 1, mask=inside, other=0)
    return tl.where(inside, tl.maximum(last - first, 1), 0)


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _gradient_kernel(
    dy_desc,
    x_desc,
    out_ptr,
    first_ptr,
    dy_scale_ptr,
    x_scale_ptr,
    experts,
    N,
    K,
    ACCUMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILES_EACH: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_k
    mine = tl.program_id(0) + tl.arange(0, TILES_EACH) * PROGRAMS
    steps = tl.sum(_steps(first_ptr, mine, tiles, tiles * experts), axis=0)
    tile = tl.program_id(0) - PROGRAMS
    expert, first, last, block, first_n, first_k = 0, 0, 0, -1, 0, 0
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    # one loop over all steps of all tiles, so that the next tile's loads begin before this one is written
    for _ in tl.range(0, steps):
        block += 1
        if block >= last:
            tile += PROGRAMS
            expert = tile // tiles
            first = tl.load(first_ptr + expert)
            last = tl.load(first_ptr + expert + 1)
            block = first
            first_n = (tile % tiles) // tiles_k * BLOCK_N
            first_k = (tile % tiles) % tiles_k * BLOCK_K
        dy = dy_desc.load([block * N + first_n, 0])
        x = x_desc.load([block * K + first_k, 0])
        total = tl.dot(dy, x.T, total, input_precision="ieee")
        done = block - first + 1  # an expert without rows has one step, without a block
        if (block >= last - 1) | (done % AT_ONCE == 0):
            scale = 0.0
            if last > first:
                scale = tl.load(dy_scale_ptr + expert) * tl.load(x_scale_ptr + expert)
            # an expert without rows has multiplied what nobody wrote: 0 · NaN is no zero
            total = tl.where(last > first, total * scale, 0.0)
            n, k = first_n + tl.arange(0, BLOCK_N), first_k + tl.arange(0, BLOCK_K // 4)
            place = out_ptr + tl.cast(expert, tl.int64) * N * K + n[:, None] * K
            # in four pieces, which need a quarter of the shared memory; the stages of the loop need the rest
            left, right = _halves(total, BLOCK_N, BLOCK_K)
            parts = _halves(left, BLOCK_N, BLOCK_K // 2) + _halves(right, BLOCK_N, BLOCK_K // 2)
            for i in tl.static_range(4):
                column = (k + i * (BLOCK_K // 4))[None, :]
                mask = (n < N)[:, None] & (column < K)
                there = mask if ACCUMULATE else mask & (done > AT_ONCE)
                part = parts[i] + tl.load(place + column, mask=there, other=0.0).to(tl.float32)
                tl.store(place + column, part.to(out_ptr.dtype.element_ty), mask=mask)
            total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)


def turned(narrow_TC: Tensor, scale_R: Tensor, source_R: Tensor | None, blocks: RowBlocks) -> Turned:
    """Turn quantised rows; with `source`, row r is line source[r] of `narrow`.

    Shapes: narrow [R,C], or [T,C] with source [R]; the rows' scales [R], powers of two.
    """
    width, room = narrow_TC.shape[1], blocks.expert_B.shape[0]
    pieces = narrow_TC.new_empty(room * width, BLOCK_R)
    scale_E = torch.empty_like(blocks.ends_E, dtype=torch.float32)
    _turn_kernel[(room, triton.cdiv(width, _TURNED_COLUMNS))](
        narrow_TC,
        scale_R,
        source_R,
        pieces.view(torch.int32),
        scale_E,
        blocks.ends_E,
        blocks.expert_B,
        blocks.row_B,
        blocks.count,
        width,
        ROWS=BLOCK_R,
        COLUMNS=_TURNED_COLUMNS,
        AT_ONCE=_SCALES_AT_ONCE,
        num_warps=_TURNED_WARPS,
    )
    return Turned(pieces, scale_E)


def fp8_weight_gradient(dy: Turned, x: Turned, blocks: RowBlocks, out_ENK: Tensor, accumulate: bool) -> None:
    """Compute every expert's weight gradient into `out`, adding to what is there if asked."""
    assert out_ENK.is_contiguous()
    experts, outputs, inputs = out_ENK.shape
    block_n, block_k, warps, stages = _TILE
    count = programs(out_ENK.device)
    all_tiles = experts * triton.cdiv(outputs, block_n) * triton.cdiv(inputs, block_k)
    _gradient_kernel[(count,)](
        tiles(dy.pieces, block_n, BLOCK_R),
        tiles(x.pieces, block_k, BLOCK_R),
        out_ENK,
        blocks.first_E,
        dy.scale_E,
        x.scale_E,
        experts,
        outputs,
        inputs,
        ACCUMULATE=accumulate,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PROGRAMS=count,
        TILES_EACH=triton.next_power_of_2(triton.cdiv(all_tiles, count)),
        AT_ONCE=_BLOCKS_AT_ONCE,
        num_warps=warps,
        num_stages=stages,
    )
