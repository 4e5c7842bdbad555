# mypy: allow-untyped-defs
"""Decode attention in two kernels: flash-decoding over splits of the KV cache, then the combination of the splits.

**Attend** (grid: splits × row blocks × sequences·groups). A program has BLOCK_M query rows (the R query heads of one
group, token by token) of one sequence and group. Split 0 attends to the new tokens themselves, taken from the
projection, and writes their keys and values into the cache; no other program of this launch reads those cache
entries. Split s ≥ 1 attends to every (num_splits - 1)-th block of BLOCK_N cached keys, so that all splits have work at
any length. Each program applies QK-norm and RoPE to its queries itself, which costs less than a separate launch. A
split yields, by the online softmax (FlashAttention-2, arXiv 2307.08691, section 2.3), the unnormalized output
Σ exp(s - m)·v, the sum Σ exp(s - m) and the maximum m. The number of splits depends on `max_start`, not on the
lengths, which are stored on the device only; programs without keys return at once, so there is no host synchronization.

**Combine** (grid: tokens·sequences·heads × blocks of CHANNELS). Rescales the partial results to the maximum over all
splits and adds them in a fixed order, SPLITS_PER_STEP at a time, then applies the output gate.

Everything is fp32 but the operands of the GEMMs, and what the reference rounds between norm and RoPE.

Shapes: as in kernels/decode/attention.py; BLOCK_M of the T·R query rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_q3n.kernels.decode.operands import AttentionHeads, QKNormWeights

# one program per SM of an H200: enough bytes in flight to saturate its memory bandwidth
TARGET_PROGRAMS = 132
# largest BLOCK_M; with more query rows the keys are read again, from the L2 cache
MAX_BLOCK_M = 32
# largest number of new tokens, and the smallest tile of a tensor core
MAX_NEW_TOKENS = tl.constexpr(16)
# blocks of the combining kernel
SPLITS_PER_STEP, CHANNELS = 64, 64
# launch options of the attending kernel
LAUNCH = {"num_warps": 4, "num_stages": 3}


@triton.jit
def _load_norm_rope(
    x_ptr,
    head_mask,
    position,
    norm_ptr,
    rotary_ptr,
    eps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
):
    """Load heads that start at `x_ptr` [·], apply RMSNorm and RoPE to them."""
    d = tl.arange(0, D)
    is_rotated = d < 2 * HALF
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    mask = head_mask[:, None]
    rotary_mask = mask & is_rotated[None, :]
    stored = x_ptr.dtype.element_ty
    x = tl.load(x_ptr[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    partner_x = tl.load(x_ptr[:, None] + partner[None, :], mask=rotary_mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        weight = WEIGHT_OFFSET + tl.load(norm_ptr + d).to(tl.float32)
        partner_weight = WEIGHT_OFFSET + tl.load(norm_ptr + partner, mask=is_rotated, other=0.0).to(tl.float32)
        x = (x * scale * weight[None, :]).to(stored).to(tl.float32)
        partner_x = (partner_x * scale * partner_weight[None, :]).to(stored).to(tl.float32)
    rotary_row_ptr = rotary_ptr + position[:, None] * (4 * HALF) + d[None, :]
    cos = tl.load(rotary_row_ptr, mask=rotary_mask, other=1.0).to(tl.float32)
    sin = tl.load(rotary_row_ptr + 2 * HALF, mask=rotary_mask, other=0.0).to(tl.float32)
    return (x * cos + partner_x * sin).to(stored)


@triton.jit
def _first_key(start, window, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first key of the block where the window of the first new token starts; later tokens start later."""
    first_key = start * 0
    if WINDOWED:
        first_key = tl.maximum(start - window + 1, 0) // BLOCK_N * BLOCK_N
    return first_key


@triton.jit
def _online_softmax_step(q, k, v, visible, row_max, row_sum, core, scale):
    """Update a running softmax with a block of keys and values (online softmax)."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    # a row without any visible key so far has the maximum -inf
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.exp(row_max - finite_max)
    weights = tl.exp(scores - finite_max[:, None])
    core = core * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_max, row_sum * rescale + tl.sum(weights, axis=1), core


# one compilation for all draft depths
@triton.jit(do_not_specialize=["tokens"])
def _attend_kernel(
    qkv_ptr,
    query_norm_ptr,
    key_norm_ptr,
    rotary_ptr,
    start_ptr,
    key_ptr,
    value_ptr,
    core_ptr,
    max_ptr,
    sum_ptr,
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
    WEIGHT_OFFSET: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split, num_splits, rows = tl.program_id(0), tl.num_programs(0), tl.num_programs(1) * BLOCK_M
    pair = tl.program_id(2).to(tl.int64)
    n, g = pair // G, pair % G
    start = tl.load(start_ptr + n).to(tl.int32)
    step = (num_splits - 1) * BLOCK_N
    start_offset = _first_key(start, window, WINDOWED, BLOCK_N) + (split - 1) * BLOCK_N
    if (split > 0) & (start_offset >= start):
        return
    # heads of a group before its key
    key_slot: tl.constexpr = 2 * R if GATED else R
    qkv_ptr += n * stride_n + g * ((key_slot + 2) * D)
    key_ptr += n * cache_stride_n + g * cache_stride_g
    value_ptr += n * cache_stride_n + g * cache_stride_g
    row, d = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    t, head = row // R, row % R
    row_mask = t < tokens
    q = _load_norm_rope(
        qkv_ptr + t * stride_t + head * D,
        row_mask,
        start + t,
        query_norm_ptr,
        rotary_ptr,
        eps,
        D,
        HALF,
        HAS_NORM,
        WEIGHT_OFFSET,
    )
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    core = tl.zeros([BLOCK_M, D], tl.float32)
    if split == 0:
        new = tl.arange(0, MAX_NEW_TOKENS)
        mask = new < tokens
        new_ptr = qkv_ptr + new * stride_t + key_slot * D
        k = _load_norm_rope(new_ptr, mask, start + new, key_norm_ptr, rotary_ptr, eps, D, HALF, HAS_NORM, WEIGHT_OFFSET)
        v = tl.load(new_ptr[:, None] + D + d[None, :], mask=mask[:, None], other=0.0)
        if tl.program_id(1) == 0:
            cache_offset = (start + new)[:, None] * D + d[None, :]
            tl.store(key_ptr + cache_offset, k, mask=mask[:, None])
            tl.store(value_ptr + cache_offset, v, mask=mask[:, None])
        visible = mask[None, :] & (new[None, :] <= t[:, None])
        if WINDOWED:
            visible &= new[None, :] > t[:, None] - window
        row_max, row_sum, core = _online_softmax_step(q, k, v, visible, row_max, row_sum, core, scale)
    else:
        for block in range(start_offset, start, step):
            key = block + tl.arange(0, BLOCK_N)
            mask = key < start
            cache_offset = key[:, None] * D + d[None, :]
            k = tl.load(key_ptr + cache_offset, mask=mask[:, None], other=0.0)
            v = tl.load(value_ptr + cache_offset, mask=mask[:, None], other=0.0)
            visible = mask[None, :]
            if WINDOWED:
                visible = visible & (key[None, :] > (start + t)[:, None] - window)
            row_max, row_sum, core = _online_softmax_step(q, k, v, visible, row_max, row_sum, core, scale)
    out = (pair * num_splits + split) * rows + row
    tl.store(max_ptr + out, row_max, mask=row_mask)
    tl.store(sum_ptr + out, row_sum, mask=row_mask)
    tl.store(core_ptr + out[:, None] * D + d[None, :], core, mask=row_mask[:, None])


@triton.jit(do_not_specialize=["sequences", "num_splits", "rows"])
def _combine_kernel(
    core_ptr,
    max_ptr,
    sum_ptr,
    qkv_ptr,
    start_ptr,
    out_ptr,
    sequences,
    num_splits,
    rows,
    stride_t,
    stride_n,
    window,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    GATED: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS_PER_STEP: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    head = tl.program_id(0) % (G * R)
    n = (tl.program_id(0) // (G * R) % sequences).to(tl.int64)
    t = tl.program_id(0) // (G * R) // sequences
    g, r = head // R, head % R
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start = tl.load(start_ptr + n).to(tl.int32)
    num_keys = start - _first_key(start, window, WINDOWED, BLOCK_N)
    num_used_splits = 1 + tl.minimum(num_splits - 1, (num_keys + BLOCK_N - 1) // BLOCK_N)
    start_offset = (n * G + g) * num_splits * rows + t * R + r
    row_max = start * 0.0 - float("inf")
    row_sum = start * 0.0
    core = tl.zeros([CHANNELS], tl.float32)
    for first_split in range(0, num_used_splits, SPLITS_PER_STEP):
        split = first_split + tl.arange(0, SPLITS_PER_STEP)
        mask = split < num_used_splits
        index = start_offset + split * rows
        maxima = tl.load(max_ptr + index, mask=mask, other=float("-inf"))
        sums = tl.load(sum_ptr + index, mask=mask, other=0.0)
        partial = tl.load(core_ptr + index[:, None] * D + d[None, :], mask=mask[:, None], other=0.0)
        # finite: in split 0 each token attends to itself
        new_max = tl.maximum(row_max, tl.max(maxima, axis=0))
        rescale, weights = tl.exp(row_max - new_max), tl.exp(maxima - new_max)
        row_sum = row_sum * rescale + tl.sum(sums * weights, axis=0)
        core = core * rescale + tl.sum(partial * weights[:, None], axis=0)
        row_max = new_max
    core = core / row_sum
    if GATED:
        gate_ptr = qkv_ptr + t * stride_t + n * stride_n + (g * (2 * R + 2) + R + r) * D
        core = core * tl.sigmoid(tl.load(gate_ptr + d).to(tl.float32))
    out_offset = tl.program_id(0).to(tl.int64) * D + d
    tl.store(out_ptr + out_offset, core.to(out_ptr.dtype.element_ty))


def decode_attention(
    qkv_TNX: Tensor,
    heads: AttentionHeads,
    norms: QKNormWeights | None,
    rotary_LW: Tensor,
    start_N: Tensor,
    max_start: int,
    key_NGCD: Tensor,
    value_NGCD: Tensor,
) -> Tensor:
    """Launch both kernels; arguments and returns as `attention.decode_attention`."""
    (tokens, sequences, _), head_dim = qkv_TNX.shape, heads.head_dim
    assert qkv_TNX.stride(2) == rotary_LW.stride(1) == 1
    # always true for one sequence, whatever its stride
    assert start_N.is_contiguous()
    assert key_NGCD.stride() == value_NGCD.stride()
    assert key_NGCD.stride()[2:] == (head_dim, 1)
    assert rotary_LW.stride(0) == rotary_LW.shape[1]
    blocks = block_sizes(tokens, heads)
    num_row_blocks = triton.cdiv(tokens * heads.queries_per_group, blocks["BLOCK_M"])
    num_programs = sequences * heads.num_groups * num_row_blocks
    num_splits = 1 + choose_num_splits(max_start, num_programs, blocks["BLOCK_N"], heads.window)
    rows = num_row_blocks * blocks["BLOCK_M"]
    core = qkv_TNX.new_empty(sequences * heads.num_groups, num_splits, rows, head_dim, dtype=torch.float32)
    row_max, row_sum = torch.empty_like(core[..., 0]), torch.empty_like(core[..., 0])
    strides, window = (qkv_TNX.stride(0), qkv_TNX.stride(1)), heads.window or 0
    shared = {
        "G": heads.num_groups,
        "R": heads.queries_per_group,
        "D": head_dim,
        "GATED": heads.is_gated,
        "WINDOWED": heads.window is not None,
        "BLOCK_N": blocks["BLOCK_N"],
    }
    query_norm, key_norm, eps, offset = (
        (None, None, 0.0, 0.0) if norms is None else (norms.query_D, norms.key_D, norms.eps, norms.offset)
    )
    _attend_kernel[(num_splits, num_row_blocks, sequences * heads.num_groups)](
        qkv_TNX,
        query_norm,
        key_norm,
        rotary_LW,
        start_N,
        key_NGCD,
        value_NGCD,
        core,
        row_max,
        row_sum,
        tokens,
        *strides,
        key_NGCD.stride(0),
        key_NGCD.stride(1),
        heads.scale,
        eps,
        window,
        HALF=rotary_LW.shape[1] // 4,
        HAS_NORM=norms is not None,
        WEIGHT_OFFSET=offset,
        BLOCK_M=blocks["BLOCK_M"],
        **shared,
        **LAUNCH,
    )
    out = qkv_TNX.new_empty(tokens, sequences, heads.num_groups * heads.queries_per_group * head_dim)
    channels = min(CHANNELS, head_dim)
    _combine_kernel[(tokens * sequences * heads.num_groups * heads.queries_per_group, head_dim // channels)](
        core,
        row_max,
        row_sum,
        qkv_TNX,
        start_N,
        out,
        sequences,
        num_splits,
        rows,
        *strides,
        window,
        SPLITS_PER_STEP=SPLITS_PER_STEP,
        CHANNELS=channels,
        **shared,
        num_warps=4,
    )
    return out


def block_sizes(tokens: int, heads: AttentionHeads) -> dict[str, int]:
    """Return BLOCK_M query rows and BLOCK_N keys of a program, as registers and shared memory permit."""
    rows = min(max(16, triton.next_power_of_2(tokens * heads.queries_per_group)), MAX_BLOCK_M)
    return {"BLOCK_M": rows, "BLOCK_N": 32 if heads.head_dim > 128 else 64}


def choose_num_splits(max_start: int, num_programs: int, block: int, window: int | None) -> int:
    """Return the number of splits of the cached keys, for a grid of `num_programs` programs without splitting."""
    max_keys = max_start if window is None else min(max_start, window + block)
    return max(1, min(triton.cdiv(max_keys, block), triton.cdiv(TARGET_PROGRAMS, num_programs)))
