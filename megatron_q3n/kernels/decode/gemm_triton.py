# mypy: allow-untyped-defs
"""Products of a few rows, one warp for a few rows of a weight, each weight read once, nobody waited for.

A warp loads its rows of the weight in pieces of some kilobytes, all lanes along a row; every input row is
normed by every warp anew, which is less than handing it on by a launch of its own, multiplied in fp32 and
added up over the lanes by shuffles, in an order that never depends on timing. Rows are unrolled: a warp has
all of a piece, and the inputs, in flight at once, and no barrier before the results are stored. Hundreds
of warps fill the GPU where a tile of a matrix product would leave it to a few dozen multiprocessors.

Tensor cores would multiply 16 rows at the price of one, but want operands in shared memory, which is a
copy and two barriers: with three to five rows the multiply-adds cost less than those (kernels/decode/gemm.py).

Shapes: as in kernels/decode/gemm.py; a program of the first weight's blocks, then one of the second's, then the one that
stores the normed rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_q3n.kernels.decode.gemm import Products, RowNorm, Rows

WARPS = 1
# most rows of a weight -> rows and columns of a piece: a piece is held in fp32, 128 registers of a lane at most, and
# some hundreds of programs are wanted; what is gained with these is in kernels/decode/gemm.py, others were not tried
WIDEST_PIECE = 1024
BLOCKS = ((1024, 4, WIDEST_PIECE), (2**15, 8, 512), (2**31, 16, 256))


@triton.jit
def _scales(x_ptr, stride, eps, R: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr):
    """Return 1 / rms of each row."""
    squares, scales = (), ()
    for _ in tl.static_range(R):
        squares += (tl.zeros([BLOCK], tl.float32),)  # type: ignore[assignment]
    for start in range(0, X, BLOCK):
        i = start + tl.arange(0, BLOCK)
        added = ()
        for r in tl.static_range(R):
            x = tl.load(x_ptr + r * stride + i, mask=i < X, other=0.0).to(tl.float32)
            added += (squares[r] + x * x,)  # type: ignore[assignment]
        squares = added
    for r in tl.static_range(R):
        scales += (tl.rsqrt(tl.sum(squares[r], axis=0) / X + eps),)  # type: ignore[assignment]
    return scales


@triton.jit
def _add_products(
    sums,
    x_ptr,
    stride,
    norm_ptr,
    eps,
    weight_ptr,
    exists,
    R: tl.constexpr,
    X: tl.constexpr,
    HAS_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to each row's sums its products with some rows of a weight, given by where they begin [BLOCK_N,1]."""
    if X <= BLOCK:  # a single piece is under way while the norm is taken
        k = tl.arange(0, BLOCK)
        piece = tl.load(weight_ptr + k[None, :], mask=exists & (k < X)[None, :], other=0.0)
        if HAS_NORM:
            tl.debug_barrier()  # of one warp: the assembler would put the loads behind the norm's shuffles
    scales = ()
    if HAS_NORM:
        scales = _scales(x_ptr, stride, eps, R, X, BLOCK)
    for start in range(0, X, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = i < X
        if X > BLOCK:
            piece = tl.load(weight_ptr + i[None, :], mask=exists & there[None, :], other=0.0)
        weight = piece.to(tl.float32)
        if HAS_NORM:
            by = OFFSET + tl.load(norm_ptr + i, mask=there, other=0.0).to(tl.float32)
        added = ()
        for r in tl.static_range(R):
            x = tl.load(x_ptr + r * stride + i, mask=there, other=0.0).to(tl.float32)
            if HAS_NORM:
                x = (x * scales[r] * by).to(x_ptr.dtype.element_ty).to(tl.float32)
            added += (sums[r] + tl.sum(weight * x[None, :], axis=1),)  # type: ignore[assignment]
        sums = added
    return sums


@triton.jit
def _keep_normed(
    x_ptr,
    stride,
    norm_ptr,
    eps,
    normed_ptr,
    R: tl.constexpr,
    X: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scales = _scales(x_ptr, stride, eps, R, X, BLOCK)
    for start in range(0, X, BLOCK):
        i = start + tl.arange(0, BLOCK)
        by = OFFSET + tl.load(norm_ptr + i, mask=i < X, other=0.0).to(tl.float32)
        for r in tl.static_range(R):
            x = tl.load(x_ptr + r * stride + i, mask=i < X, other=0.0).to(tl.float32)
            normed = (x * scales[r] * by).to(normed_ptr.dtype.element_ty)
            tl.store(normed_ptr + r * X + i, normed, mask=i < X)


@triton.jit
def _few_rows_kernel(
    x_ptr,
    norm_ptr,
    y_ptr,
    y_norm_ptr,
    weight_ptr,
    beside_ptr,
    sum_ptr,
    out_ptr,
    beside_out_ptr,
    normed_ptr,
    N,
    M,
    x_stride,
    y_stride,
    sum_stride,
    eps,
    R: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    HAS_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_BESIDE: tl.constexpr,
    HAS_SUM: tl.constexpr,
    KEEPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0)
    if KEEPS:  # noqa: SIM102  this one is the compiler's
        if block == tl.num_programs(0) - 1:
            _keep_normed(x_ptr, x_stride, norm_ptr, eps, normed_ptr, R, X, OFFSET, BLOCK_K)
            return
    if HAS_BESIDE:
        blocks = tl.cdiv(N, BLOCK_N)
        if block >= blocks:
            weight_ptr = beside_ptr
            out_ptr = beside_out_ptr
        N = tl.where(block >= blocks, M, N)
        block = tl.where(block >= blocks, block - blocks, block)
        if ALIGNED:  # which the branch hides from the compiler: 16 bytes a load instead of 2
            weight_ptr = tl.multiple_of(weight_ptr, 16)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = (n < N)[:, None]
    begin_ptr = weight_ptr + n[:, None] * (X + Y)
    sums = ()
    for _ in tl.static_range(R):
        sums += (tl.zeros([BLOCK_N], tl.float32),)  # type: ignore[assignment]
    sums = _add_products(sums, x_ptr, x_stride, norm_ptr, eps, begin_ptr, exists, R, X, HAS_NORM, OFFSET, BLOCK_K)
    if Y > 0:
        sums = _add_products(
            sums, y_ptr, y_stride, y_norm_ptr, eps, begin_ptr + X, exists, R, Y, HAS_NORM, OFFSET, BLOCK_K
        )
    for r in tl.static_range(R):
        out = sums[r]
        if HAS_SUM:
            out += tl.load(sum_ptr + r * sum_stride + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + r * N + n, out.to(out_ptr.dtype.element_ty), mask=n < N)


def few_rows(
    rows: Rows,
    weight_NK: Tensor,
    then: Rows | None,
    beside_MK: Tensor | None,
    sum_RN: Tensor | None,
    keeps: bool,
    wide: bool,
) -> Products:
    """Multiply; shapes, arguments and returns as `kernels.few_rows`."""
    x_RX, (num_rows, columns) = rows.x_RX, weight_NK.shape
    (count, width), norm = x_RX.shape, rows.norm
    second, y_norm = (None, None) if then is None else (then.x_RX, then.norm)
    _check(rows, then, weight_NK, beside_MK, sum_RN, keeps)
    made = torch.float32 if wide else x_RX.dtype
    out = x_RX.new_empty(count, num_rows, dtype=made)
    more = 0 if beside_MK is None else len(beside_MK)
    beside = None if beside_MK is None else x_RX.new_empty(count, more, dtype=made)
    normed = x_RX.new_empty(count, width) if keeps else None
    sizes = block_sizes(count, num_rows, max(width, columns - width))
    programs = sum(triton.cdiv(n, sizes["BLOCK_N"]) for n in (num_rows, more)) + keeps
    aligned = all(w is None or w.data_ptr() % 16 == 0 for w in (weight_NK, beside_MK))
    _few_rows_kernel[(programs,)](
        x_RX,
        _weight(norm),
        second,
        _weight(y_norm),
        weight_NK,
        beside_MK,
        sum_RN,
        out,
        beside,
        normed,
        num_rows,
        more,
        x_RX.stride(0),
        0 if second is None else second.stride(0),
        0 if sum_RN is None else sum_RN.stride(0),
        0.0 if norm is None else norm.eps,
        R=count,
        X=width,
        Y=columns - width,
        HAS_NORM=norm is not None,
        OFFSET=0.0 if norm is None else norm.offset,
        HAS_BESIDE=beside is not None,
        HAS_SUM=sum_RN is not None,
        KEEPS=keeps,
        ALIGNED=aligned,
        **sizes,
        num_warps=WARPS,
    )
    return Products(out, beside, normed)


def block_sizes(rows: int, num_rows: int, width: int) -> dict[str, int]:
    """Return how large a piece of a weight with `num_rows` rows is: less with many input rows, whose sums are held."""
    block_n, block_k = next((n, k) for most, n, k in BLOCKS if num_rows <= most)
    block_n = min(block_n, 16 if rows <= 4 else 8 if rows <= 8 else 4)
    if width > WIDEST_PIECE:  # several pieces, over which each row's squares are held too
        block_k = min(block_k, 1 << (2048 // rows).bit_length() - 1)
    return {"BLOCK_N": block_n, "BLOCK_K": min(block_k, max(16, triton.next_power_of_2(width)))}


def _weight(norm: RowNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight_X


def _check(
    rows: Rows, then: Rows | None, weight_NK: Tensor, beside_MK: Tensor | None, sum_RN: Tensor | None, keeps: bool
) -> None:
    """Hold what the kernel takes for granted."""
    inputs = [rows] if then is None else [rows, then]
    norms = [each.norm for each in inputs]
    assert weight_NK.shape[1] == sum(each.x_RX.shape[1] for each in inputs)
    assert all(each.x_RX.stride(1) == 1 for each in inputs)
    assert sum_RN is None or sum_RN.stride(1) == 1
    assert weight_NK.is_contiguous()
    assert weight_NK.numel() < 2**31, "places are 32-bit numbers"
    assert beside_MK is None or (beside_MK.is_contiguous() and then is None and sum_RN is None)
    assert all((norm is None) == (norms[0] is None) for norm in norms)
    assert len({(norm.eps, norm.offset) for norm in norms if norm is not None}) <= 1
    assert norms[0] is not None or not keeps
