# mypy: allow-untyped-defs
"""Gated attention of a few new tokens in two launches: read the cache in pieces, then add the pieces up.

**Reading.** A program has some rows (a token's query heads of one group, token by token) of one sequence
and group, and takes every `splits`-th block of earlier keys, so that all have work at any length. It
prepares its queries itself, which is less than handing them on. What comes of a piece is a sum over
values, the sum of the weights and the largest score (online softmax, as in flash attention). The new
tokens' own keys are a piece too, the first, taken from the projection: it writes them into the cache,
where nobody else looks for them in this launch. How many pieces there are depends on the room,
not on lengths, which only the device knows; programs without keys leave at once.

**Adding up.** The pieces that exist are weighed against the largest score of all, in their order, so that
the result never depends on timing; then the gate.

Everything is fp32 but the operands of the products, and what the composed form stores between norm and RoPE.

Shapes: as in kernels/decode/attention.py; ROWS rows of T·R, P pieces.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_q3n.kernels.decode.attention import AttentionHeads, HeadNorms

_PROGRAMS = 132  # one for each multiprocessor of an H200: enough bytes in flight to fill its memory
_MOST_ROWS = 32  # of a program; more take keys from the cache of the GPU once more
_NEW = tl.constexpr(16)  # new tokens at most, and the least that a tensor core multiplies
PIECES, CHANNELS = 64, 64  # of a program that adds up
LAUNCH = {"num_warps": 4, "num_stages": 3}  # of one that reads


@triton.jit
def _prepared(
    x_ptr,
    there,
    position,
    norm_ptr,
    rotary_ptr,
    eps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Load heads that begin at some places, norm and turn them."""
    d = tl.arange(0, D)
    is_turned = d < 2 * HALF
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    mask = there[:, None]
    mask_turned = mask & is_turned[None, :]
    stored = x_ptr.dtype.element_ty
    x = tl.load(x_ptr[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(x_ptr[:, None] + partner[None, :], mask=mask_turned, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        weight = OFFSET + tl.load(norm_ptr + d).to(tl.float32)
        partners = OFFSET + tl.load(norm_ptr + partner, mask=is_turned, other=0.0).to(tl.float32)
        x = (x * scale * weight[None, :]).to(stored).to(tl.float32)
        y = (y * scale * partners[None, :]).to(stored).to(tl.float32)
    place = rotary_ptr + position[:, None] * (4 * HALF) + d[None, :]
    cos = tl.load(place, mask=mask_turned, other=1.0).to(tl.float32)
    sin = tl.load(place + 2 * HALF, mask=mask_turned, other=0.0).to(tl.float32)
    return (x * cos + y * sin).to(stored)


@triton.jit
def _first_key(start, window, WINDOWED: tl.constexpr, BLOCK: tl.constexpr):
    """Where the blocks begin that the first new token sees; the later ones see no earlier ones."""
    first = start * 0
    if WINDOWED:
        first = tl.maximum(start - window + 1, 0) // BLOCK * BLOCK
    return first


@triton.jit
def _take_in(q, k, v, visible, top, total, core, scale):
    """Add some keys and values to a softmax that is under way."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    anchor = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    keep = tl.exp(top - anchor)
    weights = tl.exp(scores - anchor[:, None])
    core = core * keep[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return higher, total * keep + tl.sum(weights, axis=1), core


@triton.jit(do_not_specialize=["tokens"])  # one compilation for all depths of drafts
def _read_kernel(
    qkv_ptr,
    query_norm_ptr,
    key_norm_ptr,
    rotary_ptr,
    start_ptr,
    key_ptr,
    value_ptr,
    core_ptr,
    top_ptr,
    total_ptr,
    tokens,
    stride_t,
    stride_n,
    cache_stride_n,
    cache_stride_g,
    scale,
    eps,
    window,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    GATED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    WINDOWED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece, pieces, rows = tl.program_id(0), tl.num_programs(0), tl.num_programs(1) * ROWS
    place = tl.program_id(2).to(tl.int64)
    n, g = place // G, place % G
    start = tl.load(start_ptr + n).to(tl.int32)
    step = (pieces - 1) * BLOCK
    begin = _first_key(start, window, WINDOWED, BLOCK) + (piece - 1) * BLOCK
    if (piece > 0) & (begin >= start):
        return
    own: tl.constexpr = 2 * R if GATED else R  # heads of a group before its key
    qkv_ptr += n * stride_n + g * ((own + 2) * D)
    key_ptr += n * cache_stride_n + g * cache_stride_g
    value_ptr += n * cache_stride_n + g * cache_stride_g
    row, d = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    t, head = row // R, row % R
    exists = t < tokens
    q = _prepared(
        qkv_ptr + t * stride_t + head * D, exists, start + t, query_norm_ptr, rotary_ptr, eps, D, HALF, HAS_NORM, OFFSET
    )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    core = tl.zeros([ROWS, D], tl.float32)
    if piece == 0:
        new = tl.arange(0, _NEW)
        there = new < tokens
        new_ptr = qkv_ptr + new * stride_t + own * D
        k = _prepared(new_ptr, there, start + new, key_norm_ptr, rotary_ptr, eps, D, HALF, HAS_NORM, OFFSET)
        v = tl.load(new_ptr[:, None] + D + d[None, :], mask=there[:, None], other=0.0)
        if tl.program_id(1) == 0:
            at = (start + new)[:, None] * D + d[None, :]
            tl.store(key_ptr + at, k, mask=there[:, None])
            tl.store(value_ptr + at, v, mask=there[:, None])
        visible = there[None, :] & (new[None, :] <= t[:, None])
        if WINDOWED:
            visible &= new[None, :] > t[:, None] - window
        top, total, core = _take_in(q, k, v, visible, top, total, core, scale)
    else:
        for block in range(begin, start, step):
            key = block + tl.arange(0, BLOCK)
            there = key < start
            at = key[:, None] * D + d[None, :]
            k = tl.load(key_ptr + at, mask=there[:, None], other=0.0)
            v = tl.load(value_ptr + at, mask=there[:, None], other=0.0)
            visible = there[None, :]
            if WINDOWED:
                visible = visible & (key[None, :] > (start + t)[:, None] - window)
            top, total, core = _take_in(q, k, v, visible, top, total, core, scale)
    out = (place * pieces + piece) * rows + row
    tl.store(top_ptr + out, top, mask=exists)
    tl.store(total_ptr + out, total, mask=exists)
    tl.store(core_ptr + out[:, None] * D + d[None, :], core, mask=exists[:, None])


@triton.jit(do_not_specialize=["sequences", "pieces", "rows"])
def _join_kernel(
    core_ptr,
    top_ptr,
    total_ptr,
    qkv_ptr,
    start_ptr,
    out_ptr,
    sequences,
    pieces,
    rows,
    stride_t,
    stride_n,
    window,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    GATED: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    head = tl.program_id(0) % (G * R)
    n = (tl.program_id(0) // (G * R) % sequences).to(tl.int64)
    t = tl.program_id(0) // (G * R) // sequences
    g, r = head // R, head % R
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start = tl.load(start_ptr + n).to(tl.int32)
    seen = start - _first_key(start, window, WINDOWED, BLOCK)
    existing = 1 + tl.minimum(pieces - 1, (seen + BLOCK - 1) // BLOCK)
    begin = (n * G + g) * pieces * rows + t * R + r
    top = start * 0.0 - float("inf")
    total = start * 0.0
    core = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, existing, PIECES):
        piece = first + tl.arange(0, PIECES)
        there = piece < existing
        place = begin + piece * rows
        tops = tl.load(top_ptr + place, mask=there, other=float("-inf"))
        totals = tl.load(total_ptr + place, mask=there, other=0.0)
        cores = tl.load(core_ptr + place[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
        higher = tl.maximum(top, tl.max(tops, axis=0))  # finite: the first piece sees itself
        keep, weights = tl.exp(top - higher), tl.exp(tops - higher)
        total = total * keep + tl.sum(totals * weights, axis=0)
        core = core * keep + tl.sum(cores * weights[:, None], axis=0)
        top = higher
    core = core / total
    if GATED:
        gate_ptr = qkv_ptr + t * stride_t + n * stride_n + (g * (2 * R + 2) + R + r) * D
        core = core * tl.sigmoid(tl.load(gate_ptr + d).to(tl.float32))
    out_place = tl.program_id(0).to(tl.int64) * D + d
    tl.store(out_ptr + out_place, core.to(out_ptr.dtype.element_ty))


def few_queries(
    qkv_TNX: Tensor,
    heads: AttentionHeads,
    norms: HeadNorms | None,
    rotary_LW: Tensor,
    start_N: Tensor,
    room: int,
    key_NGCD: Tensor,
    value_NGCD: Tensor,
) -> Tensor:
    """Attend, and write the cache; shapes and returns as `kernels.few_queries`."""
    (tokens, sequences, _), dim = qkv_TNX.shape, heads.dim
    assert qkv_TNX.stride(2) == rotary_LW.stride(1) == 1
    assert start_N.is_contiguous()  # of one sequence, with any stride
    assert key_NGCD.stride() == value_NGCD.stride()
    assert key_NGCD.stride()[2:] == (dim, 1)
    assert rotary_LW.stride(0) == rotary_LW.shape[1]
    sizes = block_sizes(tokens, heads)
    row_blocks = triton.cdiv(tokens * heads.queries, sizes["ROWS"])
    programs = sequences * heads.groups * row_blocks
    pieces = 1 + num_splits(room, programs, sizes["BLOCK"], heads.window)
    rows = row_blocks * sizes["ROWS"]
    core = qkv_TNX.new_empty(sequences * heads.groups, pieces, rows, dim, dtype=torch.float32)
    top, total = torch.empty_like(core[..., 0]), torch.empty_like(core[..., 0])
    strides, window = (qkv_TNX.stride(0), qkv_TNX.stride(1)), heads.window or 0
    shared = {
        "G": heads.groups,
        "R": heads.queries,
        "D": dim,
        "GATED": heads.is_gated,
        "WINDOWED": heads.window is not None,
        "BLOCK": sizes["BLOCK"],
    }
    query_norm, key_norm, eps, offset = (
        (None, None, 0.0, 0.0) if norms is None else (norms.query_D, norms.key_D, norms.eps, norms.offset)
    )
    _read_kernel[(pieces, row_blocks, sequences * heads.groups)](
        qkv_TNX,
        query_norm,
        key_norm,
        rotary_LW,
        start_N,
        key_NGCD,
        value_NGCD,
        core,
        top,
        total,
        tokens,
        *strides,
        key_NGCD.stride(0),
        key_NGCD.stride(1),
        heads.scale,
        eps,
        window,
        HALF=rotary_LW.shape[1] // 4,
        HAS_NORM=norms is not None,
        OFFSET=offset,
        ROWS=sizes["ROWS"],
        **shared,
        **LAUNCH,
    )
    out = qkv_TNX.new_empty(tokens, sequences, heads.groups * heads.queries * dim)
    channels = min(CHANNELS, dim)
    _join_kernel[(tokens * sequences * heads.groups * heads.queries, dim // channels)](
        core,
        top,
        total,
        qkv_TNX,
        start_N,
        out,
        sequences,
        pieces,
        rows,
        *strides,
        window,
        PIECES=PIECES,
        CHANNELS=channels,
        **shared,
        num_warps=4,
    )
    return out


def block_sizes(tokens: int, heads: AttentionHeads) -> dict[str, int]:
    """Return how many rows a program has, and keys a block: what its registers and shared memory hold."""
    rows = min(max(16, triton.next_power_of_2(tokens * heads.queries)), _MOST_ROWS)
    return {"ROWS": rows, "BLOCK": 32 if heads.dim > 128 else 64}


def num_splits(room: int, programs: int, block: int, window: int | None) -> int:
    """Return over how many programs earlier keys are spread, where there are so many without."""
    reach = room if window is None else min(room, window + block)
    return max(1, min(triton.cdiv(reach, block), triton.cdiv(_PROGRAMS, programs)))
