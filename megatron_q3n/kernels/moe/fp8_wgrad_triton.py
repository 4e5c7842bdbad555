# mypy: allow-untyped-defs
"""Grouped weight-gradient GEMM of all experts in FP8, with operands transposed so that the summed dimension is last.

    dW[e] += dY[rows of e]ᵀ · X[rows of e]

FP8 tensor cores need the summed dimension last in both operands; here it is the rows, which are first. So each block of
128 rows of one expert (the blocks of `grouped_gemm`) is transposed to [C,128], zero-padded. Rows come with scales of
their own, which cannot be factored out of a sum over rows. They are powers of two (`fp8_quantize_triton.py`), so
rescaling all rows of an expert to the largest scale needs no second rounding: only values below e4m3's smallest normal
number lose bits, and that is 2⁻¹⁵ of the expert's largest.

Hopper's tensor cores accumulate FP8 products with some 14 bits, which shrinks long sums of one sign. So a sum in the
tensor cores has at most 2,048 rows, as in the products with weights; an expert with more rows adds the next 2,048 to
the stored fp32 result.

Launch geometry: transposition, grid (row blocks × cdiv(C, BLOCK_C)). GEMM: persistent kernel, one program per SM, over
tiles of BLOCK_N outputs × BLOCK_K inputs of one expert; one flat loop over the steps of all its tiles.

Reference: DeepSeek-V3 (arXiv 2412.19437), section 3.3, transposes rows with scales of 128 × 1 and accumulates in fp32
between them, which takes twice the registers; one scale per expert needs no scaling in between.
Shapes: R rows sorted by expert, B row blocks, C columns, E experts, N outputs, K inputs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_q3n.kernels.moe.grouped_gemm_triton import BLOCK_R, RowBlocks, num_programs, tma_descriptor

# On an H200 for 128 experts of 1,280 rows: 2048 columns gathered from 16,384 tokens 0.145 ms, 1024 columns without a
# gather 0.104; byte by byte, in 64 columns, 0.173 and 0.125.
_TRANSPOSE_BLOCK_C, _TRANSPOSE_WARPS = 128, 4
_SCALES_PER_STEP = 1024
# BLOCK_N, BLOCK_K, num_warps, num_stages. For the same rows, 1024 × 2048 written: 0.66 ms (1037 TFLOP/s; in bf16 1.26);
# three stages 0.69; 256 × 128 0.75; two programs of 128 × 128 per SM 0.72. Accumulated instead of written: 1.05 ms.
_TILE = (128, 256, 8, 4)
# blocks of 128 rows that the tensor cores accumulate before the sum is added in fp32
_BLOCKS_PER_SUM = 16


@dataclass(frozen=True)
class TransposedRows:
    """Rows transposed block by block. Shapes: blocks [B·C,128] in e4m3; scale of each expert's rows [E]."""

    blocks: Tensor
    scale_E: Tensor


@triton.jit
def _load_rescaled_bytes(x_ptr, scale_ptr, source_ptr, r, end, c, WIDTH, scale):
    """Load rows, rescaled to their expert's scale, one byte per 32-bit word."""
    source = r
    if source_ptr is not None:
        source = tl.load(source_ptr + r, mask=r < end, other=0)
    mask = (r < end)[:, None] & (c < WIDTH)[None, :]
    x = tl.load(x_ptr + source.to(tl.int64)[:, None] * WIDTH + c[None, :], mask=mask, other=0.0)
    # a quotient of powers of two, at most 1: exact in fp16 until the result is below the range of e4m3
    factor = (tl.load(scale_ptr + r, mask=r < end, other=0.0) / scale).to(tl.float16)
    x = (x.to(tl.float16) * factor[:, None]).to(x_ptr.dtype.element_ty)
    return x.to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def _transpose_kernel(
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
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SCALES_PER_STEP: tl.constexpr,
):
    block = tl.program_id(0)
    if block < tl.load(count_ptr):
        expert = tl.load(expert_ptr + block)
        first = tl.load(row_ptr + block)
        end = tl.load(ends_ptr + expert)
        start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        max_scale = tl.zeros((SCALES_PER_STEP,), tl.float32)
        for row in range(start, end, SCALES_PER_STEP):
            r = row + tl.arange(0, SCALES_PER_STEP)
            max_scale = tl.maximum(max_scale, tl.load(scale_ptr + r, mask=r < end, other=0.0))
        scale = tl.max(max_scale, axis=0)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        # four rows of a column form one 32-bit word, which is transposed as a unit: single bytes would cost four times
        # the traffic in shared memory
        word_row = tl.arange(0, BLOCK_R // 4)
        r = first + 4 * word_row
        x = _load_rescaled_bytes(x_ptr, scale_ptr, source_ptr, r, end, c, WIDTH, scale)
        x |= _load_rescaled_bytes(x_ptr, scale_ptr, source_ptr, r + 1, end, c, WIDTH, scale) << 8
        x |= _load_rescaled_bytes(x_ptr, scale_ptr, source_ptr, r + 2, end, c, WIDTH, scale) << 16
        x |= _load_rescaled_bytes(x_ptr, scale_ptr, source_ptr, r + 3, end, c, WIDTH, scale) << 24
        ptr = (tl.cast(block, tl.int64) * WIDTH + c)[:, None] * (BLOCK_R // 4) + word_row[None, :]
        tl.store(out_ptr + ptr, tl.trans(x), mask=(c < WIDTH)[:, None])
        if (first == start) & (tl.program_id(1) == 0):
            tl.store(out_scale_ptr + expert, scale)


@triton.jit
def _num_steps(first_ptr, tile, num_tiles, all_tiles):
    """Return the loop steps of a tile: its expert's blocks, or one for an expert without rows, which writes zeros."""
    expert = tile // num_tiles
    is_valid = tile < all_tiles
    first = tl.load(first_ptr + expert, mask=is_valid, other=0)
    last = tl.load(first_ptr + expert + 1, mask=is_valid, other=0)
    return tl.where(is_valid, tl.maximum(last - first, 1), 0)


@triton.jit
def _halves(x, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_R, 2, BLOCK_C // 2)), (0, 2, 1)))


@triton.jit
def _fp8_wgrad_kernel(
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
    NUM_PROGRAMS: tl.constexpr,
    TILES_PER_PROGRAM: tl.constexpr,
    BLOCKS_PER_SUM: tl.constexpr,
):
    tiles_k = tl.cdiv(K, BLOCK_K)
    num_tiles = tl.cdiv(N, BLOCK_N) * tiles_k
    tile_ids = tl.program_id(0) + tl.arange(0, TILES_PER_PROGRAM) * NUM_PROGRAMS
    steps = tl.sum(_num_steps(first_ptr, tile_ids, num_tiles, num_tiles * experts), axis=0)
    tile = tl.program_id(0) - NUM_PROGRAMS
    expert, first, last, block, first_n, first_k = 0, 0, 0, -1, 0, 0
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    # one loop over the steps of all tiles, so that the next tile's loads begin before this one is written
    for _ in tl.range(0, steps):
        block += 1
        if block >= last:
            tile += NUM_PROGRAMS
            expert = tile // num_tiles
            first = tl.load(first_ptr + expert)
            last = tl.load(first_ptr + expert + 1)
            block = first
            first_n = (tile % num_tiles) // tiles_k * BLOCK_N
            first_k = (tile % num_tiles) % tiles_k * BLOCK_K
        dy = dy_desc.load([block * N + first_n, 0])
        x = x_desc.load([block * K + first_k, 0])
        acc = tl.dot(dy, x.T, acc, input_precision="ieee")
        # an expert without rows has one step, without a block
        done = block - first + 1
        if (block >= last - 1) | (done % BLOCKS_PER_SUM == 0):
            scale = 0.0
            if last > first:
                scale = tl.load(dy_scale_ptr + expert) * tl.load(x_scale_ptr + expert)
            # for an expert without rows the operands are uninitialized: 0 · NaN is not zero
            acc = tl.where(last > first, acc * scale, 0.0)
            n, k = first_n + tl.arange(0, BLOCK_N), first_k + tl.arange(0, BLOCK_K // 4)
            ptr = out_ptr + tl.cast(expert, tl.int64) * N * K + n[:, None] * K
            # four stores need a quarter of the shared memory; the pipeline stages of the loop need the rest
            left, right = _halves(acc, BLOCK_N, BLOCK_K)
            parts = _halves(left, BLOCK_N, BLOCK_K // 2) + _halves(right, BLOCK_N, BLOCK_K // 2)
            for i in tl.static_range(4):
                column = (k + i * (BLOCK_K // 4))[None, :]
                mask = (n < N)[:, None] & (column < K)
                load_mask = mask if ACCUMULATE else mask & (done > BLOCKS_PER_SUM)
                part = parts[i] + tl.load(ptr + column, mask=load_mask, other=0.0).to(tl.float32)
                tl.store(ptr + column, part.to(out_ptr.dtype.element_ty), mask=mask)
            acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)


def transpose_rows(fp8_TC: Tensor, scale_R: Tensor, source_R: Tensor | None, row_blocks: RowBlocks) -> TransposedRows:
    """Transpose quantized rows block by block; with `source`, row r is row source[r] of `fp8`.

    Shapes: fp8 [R,C], or [T,C] with source [R]; the rows' scales [R], powers of two.
    """
    width, capacity = fp8_TC.shape[1], row_blocks.expert_B.shape[0]
    blocks = fp8_TC.new_empty(capacity * width, BLOCK_R)
    scale_E = torch.empty_like(row_blocks.ends_E, dtype=torch.float32)
    _transpose_kernel[(capacity, triton.cdiv(width, _TRANSPOSE_BLOCK_C))](
        fp8_TC,
        scale_R,
        source_R,
        blocks.view(torch.int32),
        scale_E,
        row_blocks.ends_E,
        row_blocks.expert_B,
        row_blocks.row_B,
        row_blocks.count,
        width,
        BLOCK_R=BLOCK_R,
        BLOCK_C=_TRANSPOSE_BLOCK_C,
        SCALES_PER_STEP=_SCALES_PER_STEP,
        num_warps=_TRANSPOSE_WARPS,
    )
    return TransposedRows(blocks, scale_E)


def fp8_weight_gradient(
    dy: TransposedRows, x: TransposedRows, row_blocks: RowBlocks, out_ENK: Tensor, accumulate: bool
) -> None:
    """Compute every expert's weight gradient into `out`, or add it if `accumulate`."""
    assert out_ENK.is_contiguous()
    experts, outputs, inputs = out_ENK.shape
    block_n, block_k, warps, stages = _TILE
    grid_size = num_programs(out_ENK.device)
    all_tiles = experts * triton.cdiv(outputs, block_n) * triton.cdiv(inputs, block_k)
    _fp8_wgrad_kernel[(grid_size,)](
        tma_descriptor(dy.blocks, block_n, BLOCK_R),
        tma_descriptor(x.blocks, block_k, BLOCK_R),
        out_ENK,
        row_blocks.first_E,
        dy.scale_E,
        x.scale_E,
        experts,
        outputs,
        inputs,
        ACCUMULATE=accumulate,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        NUM_PROGRAMS=grid_size,
        TILES_PER_PROGRAM=triton.next_power_of_2(triton.cdiv(all_tiles, grid_size)),
        BLOCKS_PER_SUM=_BLOCKS_PER_SUM,
        num_warps=warps,
        num_stages=stages,
    )
