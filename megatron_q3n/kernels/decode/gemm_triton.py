# mypy: allow-untyped-defs
"""Decode GEMM in Triton: one warp for a few rows of a weight, each weight read once, no barrier inside.

Launch geometry: program `block` computes BLOCK_N outputs n for all R input rows. A warp iterates over its weight rows
in blocks of BLOCK_N × BLOCK_K elements, all lanes along a row. Each warp computes the RMSNorm of every input row itself
(prologue), which costs less than a separate launch; products are accumulated in fp32 per lane and reduced over lanes by
shuffles, in a fixed order. Input rows are unrolled, so the loads of a weight block and of all inputs are in flight
together, and there is no barrier before the results are stored. Hundreds of warps fill the GPU, where output tiles of a
standard GEMM would occupy a few dozen SMs.

Tensor cores process 16 rows at the price of one, but need operands in shared memory: a copy and two barriers, which
cost more than the multiply-adds of three to five rows (limits: kernels/decode/gemm.py).

Grid: cdiv(N, BLOCK_N) programs for the first weight, cdiv(M, BLOCK_N) for the second, and one that stores the normed
rows where they are returned. Shapes: as in kernels/decode/gemm.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_q3n.kernels.decode.operands import GemmInput, GemmOutput, RMSNormWeights

NUM_WARPS = 1
# (largest N, BLOCK_N, BLOCK_K): a block is held in fp32, at most 128 registers of a lane, and the grid should have some
# hundreds of programs; the speed with these is in kernels/decode/gemm.py, others were not tried
MAX_BLOCK_K = 1024
BLOCK_SIZES = ((1024, 4, MAX_BLOCK_K), (2**15, 8, 512), (2**31, 16, 256))


@triton.jit
def _scales(x_ptr, stride, eps, R: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr):
    """Return 1 / rms of each row."""
    squares, scales = (), ()
    for _ in tl.static_range(R):
        squares += (tl.zeros([BLOCK], tl.float32),)  # type: ignore[assignment]
    for start in range(0, X, BLOCK):
        i = start + tl.arange(0, BLOCK)
        updated = ()
        for r in tl.static_range(R):
            x = tl.load(x_ptr + r * stride + i, mask=i < X, other=0.0).to(tl.float32)
            updated += (squares[r] + x * x,)  # type: ignore[assignment]
        squares = updated
    for r in tl.static_range(R):
        scales += (tl.rsqrt(tl.sum(squares[r], axis=0) / X + eps),)  # type: ignore[assignment]
    return scales


@triton.jit
def _accumulate(
    sums,
    x_ptr,
    stride,
    norm_ptr,
    eps,
    weight_ptr,
    row_mask,
    R: tl.constexpr,
    X: tl.constexpr,
    HAS_NORM: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add each input row's products with BLOCK_N weight rows, which start at `weight_ptr` [BLOCK_N,1], to its sums."""
    if X <= BLOCK:
        # a single block: its loads are in flight while the norm is computed
        k = tl.arange(0, BLOCK)
        weight_block = tl.load(weight_ptr + k[None, :], mask=row_mask & (k < X)[None, :], other=0.0)
        if HAS_NORM:
            # a barrier of one warp: without it the assembler places the loads behind the norm's shuffles
            tl.debug_barrier()
    scales = ()
    if HAS_NORM:
        scales = _scales(x_ptr, stride, eps, R, X, BLOCK)
    for start in range(0, X, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < X
        if X > BLOCK:
            weight_block = tl.load(weight_ptr + i[None, :], mask=row_mask & mask[None, :], other=0.0)
        weight = weight_block.to(tl.float32)
        if HAS_NORM:
            norm_scale = WEIGHT_OFFSET + tl.load(norm_ptr + i, mask=mask, other=0.0).to(tl.float32)
        updated = ()
        for r in tl.static_range(R):
            x = tl.load(x_ptr + r * stride + i, mask=mask, other=0.0).to(tl.float32)
            if HAS_NORM:
                x = (x * scales[r] * norm_scale).to(x_ptr.dtype.element_ty).to(tl.float32)
            updated += (sums[r] + tl.sum(weight * x[None, :], axis=1),)  # type: ignore[assignment]
        sums = updated
    return sums


@triton.jit
def _store_normed(
    x_ptr,
    stride,
    norm_ptr,
    eps,
    normed_ptr,
    R: tl.constexpr,
    X: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scales = _scales(x_ptr, stride, eps, R, X, BLOCK)
    for start in range(0, X, BLOCK):
        i = start + tl.arange(0, BLOCK)
        norm_scale = WEIGHT_OFFSET + tl.load(norm_ptr + i, mask=i < X, other=0.0).to(tl.float32)
        for r in tl.static_range(R):
            x = tl.load(x_ptr + r * stride + i, mask=i < X, other=0.0).to(tl.float32)
            normed = (x * scales[r] * norm_scale).to(normed_ptr.dtype.element_ty)
            tl.store(normed_ptr + r * X + i, normed, mask=i < X)


@triton.jit
def _decode_gemm_kernel(
    x_ptr,
    norm_ptr,
    y_ptr,
    y_norm_ptr,
    weight_ptr,
    second_weight_ptr,
    residual_ptr,
    out_ptr,
    second_out_ptr,
    normed_ptr,
    N,
    M,
    x_stride,
    y_stride,
    residual_stride,
    eps,
    R: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    HAS_NORM: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_SECOND_WEIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STORE_NORMED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0)
    if STORE_NORMED:  # noqa: SIM102  a compile-time condition
        if block == tl.num_programs(0) - 1:
            _store_normed(x_ptr, x_stride, norm_ptr, eps, normed_ptr, R, X, WEIGHT_OFFSET, BLOCK_K)
            return
    if HAS_SECOND_WEIGHT:
        num_first_blocks = tl.cdiv(N, BLOCK_N)
        if block >= num_first_blocks:
            weight_ptr = second_weight_ptr
            out_ptr = second_out_ptr
        N = tl.where(block >= num_first_blocks, M, N)
        block = tl.where(block >= num_first_blocks, block - num_first_blocks, block)
        if ALIGNED:
            # the branch hides the alignment from the compiler: 16 bytes a load instead of 2
            weight_ptr = tl.multiple_of(weight_ptr, 16)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = (n < N)[:, None]
    row_ptr = weight_ptr + n[:, None] * (X + Y)
    sums = ()
    for _ in tl.static_range(R):
        sums += (tl.zeros([BLOCK_N], tl.float32),)  # type: ignore[assignment]
    sums = _accumulate(sums, x_ptr, x_stride, norm_ptr, eps, row_ptr, row_mask, R, X, HAS_NORM, WEIGHT_OFFSET, BLOCK_K)
    if Y > 0:
        sums = _accumulate(
            sums, y_ptr, y_stride, y_norm_ptr, eps, row_ptr + X, row_mask, R, Y, HAS_NORM, WEIGHT_OFFSET, BLOCK_K
        )
    for r in tl.static_range(R):
        out = sums[r]
        if HAS_RESIDUAL:
            out += tl.load(residual_ptr + r * residual_stride + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + r * N + n, out.to(out_ptr.dtype.element_ty), mask=n < N)


def decode_gemm(
    first: GemmInput,
    weight_NK: Tensor,
    second: GemmInput | None,
    second_weight_MK: Tensor | None,
    residual_RN: Tensor | None,
    returns_normed: bool,
    fp32_output: bool,
) -> GemmOutput:
    """Launch the kernel; arguments and returns as `gemm.decode_gemm`."""
    x_RX, (out_width, columns) = first.x_RX, weight_NK.shape
    (num_rows, width), norm = x_RX.shape, first.norm
    second_x, y_norm = (None, None) if second is None else (second.x_RX, second.norm)
    _check(first, second, weight_NK, second_weight_MK, residual_RN, returns_normed)
    out_dtype = torch.float32 if fp32_output else x_RX.dtype
    out = x_RX.new_empty(num_rows, out_width, dtype=out_dtype)
    second_width = 0 if second_weight_MK is None else len(second_weight_MK)
    second_out = None if second_weight_MK is None else x_RX.new_empty(num_rows, second_width, dtype=out_dtype)
    normed = x_RX.new_empty(num_rows, width) if returns_normed else None
    blocks = block_sizes(num_rows, out_width, max(width, columns - width))
    num_programs = sum(triton.cdiv(n, blocks["BLOCK_N"]) for n in (out_width, second_width)) + returns_normed
    is_aligned = all(w is None or w.data_ptr() % 16 == 0 for w in (weight_NK, second_weight_MK))
    _decode_gemm_kernel[(num_programs,)](
        x_RX,
        _norm_weight(norm),
        second_x,
        _norm_weight(y_norm),
        weight_NK,
        second_weight_MK,
        residual_RN,
        out,
        second_out,
        normed,
        out_width,
        second_width,
        x_RX.stride(0),
        0 if second_x is None else second_x.stride(0),
        0 if residual_RN is None else residual_RN.stride(0),
        0.0 if norm is None else norm.eps,
        R=num_rows,
        X=width,
        Y=columns - width,
        HAS_NORM=norm is not None,
        WEIGHT_OFFSET=0.0 if norm is None else norm.offset,
        HAS_SECOND_WEIGHT=second_out is not None,
        HAS_RESIDUAL=residual_RN is not None,
        STORE_NORMED=returns_normed,
        ALIGNED=is_aligned,
        **blocks,
        num_warps=NUM_WARPS,
    )
    return GemmOutput(out, second_out, normed)


def block_sizes(num_rows: int, out_width: int, width: int) -> dict[str, int]:
    """Return BLOCK_N and BLOCK_K for a weight [out_width,width]; more input rows leave fewer registers."""
    block_n, block_k = next((n, k) for limit, n, k in BLOCK_SIZES if out_width <= limit)
    block_n = min(block_n, 16 if num_rows <= 4 else 8 if num_rows <= 8 else 4)
    if width > MAX_BLOCK_K:
        # several blocks of K: the squares of each row are in registers too
        block_k = min(block_k, 1 << (2048 // num_rows).bit_length() - 1)
    return {"BLOCK_N": block_n, "BLOCK_K": min(block_k, max(16, triton.next_power_of_2(width)))}


def _norm_weight(norm: RMSNormWeights | None) -> Tensor | None:
    return None if norm is None else norm.weight_X


def _check(
    first: GemmInput,
    second: GemmInput | None,
    weight_NK: Tensor,
    second_weight_MK: Tensor | None,
    residual_RN: Tensor | None,
    returns_normed: bool,
) -> None:
    """Assert what the kernel assumes of its operands."""
    inputs = [first] if second is None else [first, second]
    norms = [operand.norm for operand in inputs]
    assert weight_NK.shape[1] == sum(operand.x_RX.shape[1] for operand in inputs)
    assert all(operand.x_RX.stride(1) == 1 for operand in inputs)
    assert residual_RN is None or residual_RN.stride(1) == 1
    assert weight_NK.is_contiguous()
    assert weight_NK.numel() < 2**31, "offsets are 32-bit integers"
    assert second_weight_MK is None or (second_weight_MK.is_contiguous() and second is None and residual_RN is None)
    assert all((norm is None) == (norms[0] is None) for norm in norms)
    assert len({(norm.eps, norm.offset) for norm in norms if norm is not None}) <= 1
    assert norms[0] is not None or not returns_normed
