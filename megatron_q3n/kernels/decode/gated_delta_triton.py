# mypy: allow-untyped-defs
"""Decode Gated DeltaNet step in one kernel: convolution, gates, delta rule and gated norm of a few tokens.

    S ← exp(g_t) S + k_t ⊗ β_t (v_t - k_tᵀ exp(g_t) S)        o_t = scale · q_tᵀ S        (arXiv 2412.06464, eq. 10)

Launch geometry: grid (NUM_SPLITS, value heads, sequences). A program has one value head of one sequence. The state, a
DIM × DIM matrix, stays in registers for all tokens and is written after each: a warp has DIM / NUM_WARPS columns, and
all rows of them in its LANES lanes and registers, so no warp synchronizes with another inside the rule. The kernel is
bound by latency, not by bytes or FLOPs: all loads before the first token are in flight together, a token's inputs are
loaded while the one before it is mixed, and the last inputs of the convolution stay in registers. Four warps are one
for each scheduler of an SM. While most SMs are idle, NUM_SPLITS programs compute the same and each writes a part of
the states, since one SM takes some 0.6 µs to write a matrix; the first one writes everything else.

The convolution of a key head is repeated by each of its value heads, which costs a few loads.

Everything is fp32 inside; q, k, v and the rule's output are rounded to the projection's dtype where the reference
stores them, so that both give the same results.

T tokens, B sequences, Hk/Hv key/value heads, D head dim (a power of two), CONV_KERNEL_SIZE of the conv1d.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_q3n.kernels.gated_delta.operands import DeltaHeads, DeltaWeights

# columns of the state per warp: with heads of 128 a thread holds 128 elements, and a warp writes whole cache lines
_COLUMNS_PER_WARP = 32
# about the number of SMs: the states are split over more programs only while some SMs are idle
_TARGET_PROGRAMS = 128
_MAX_SPLITS = 4


@triton.jit
def _load_interleaved(ptr, offset, stride: tl.constexpr, COUNT: tl.constexpr):
    """Load COUNT interleaved vectors, as fp32."""
    vectors = ()
    for j in tl.static_range(COUNT):
        vectors += (tl.load(ptr + offset * stride + j).to(tl.float32),)  # type: ignore[assignment]
    return vectors


@triton.jit
def _convolve(history, x, conv_weight, CONV_KERNEL_SIZE: tl.constexpr):
    """Return SiLU of the convolution over a token's input x and the inputs before it."""
    acc = x * conv_weight[CONV_KERNEL_SIZE - 1]
    for j in tl.static_range(CONV_KERNEL_SIZE - 1):
        acc += history[j] * conv_weight[j]
    return acc * tl.sigmoid(acc)


@triton.jit
def _shift_history(history, x, CONV_KERNEL_SIZE: tl.constexpr):
    """Return the last CONV_KERNEL_SIZE - 1 inputs up to x."""
    shifted = ()
    for j in tl.static_range(1, CONV_KERNEL_SIZE - 1):
        shifted += (history[j],)  # type: ignore[assignment]
    shifted += (x,)  # type: ignore[assignment]
    return shifted


@triton.jit
def _store_history(ptr, channel, inputs, CONV_KERNEL_SIZE: tl.constexpr):
    for j in tl.static_range(CONV_KERNEL_SIZE - 1):
        tl.store(ptr + channel * (CONV_KERNEL_SIZE - 1) + j, inputs[j].to(ptr.dtype.element_ty))


@triton.jit
def _load_token(ptr, t, tokens, stride_t, offset):
    return tl.load(ptr + t * stride_t + offset, mask=t < tokens, other=0.0).to(tl.float32)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _broadcast_rows(x, LANES: tl.constexpr, ROWS_PER_LANE: tl.constexpr):
    """Broadcast a vector along the rows of a state.

    The transposition hides the layout from the compiler, which would otherwise recompute the vector in every thread
    that reads it.
    """
    return tl.trans(tl.reshape(x, [ROWS_PER_LANE, LANES]))[:, None, :, None]


@triton.jit
def _sum_rows(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit(do_not_specialize=["tokens"])
def _decode_gated_delta_kernel(
    x_ptr,
    ba_ptr,
    conv_weight_ptr,
    a_log_ptr,
    dt_bias_ptr,
    norm_ptr,
    conv_ptr,
    delta_ptr,
    out_ptr,
    conv_out_ptr,
    delta_out_ptr,
    tokens,
    stride_t,
    stride_b,
    ba_stride_t,
    ba_stride_b,
    scale,
    eps,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    CONV_KERNEL_SIZE: tl.constexpr,
    LANES: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group: tl.constexpr = VALUE_HEADS // KEY_HEADS
    channels: tl.constexpr = (2 * KEY_HEADS + VALUE_HEADS) * DIM
    rows_per_lane: tl.constexpr = DIM // LANES
    width: tl.constexpr = DIM // NUM_WARPS
    key_head, dim, lane_row = head // group, tl.arange(0, DIM), tl.arange(0, rows_per_lane)
    column = tl.arange(0, NUM_WARPS)[:, None] * width + tl.arange(0, width)[None, :]
    state_row = lane_row[None, None, :, None] * LANES + tl.arange(0, LANES)[:, None, None, None]
    state_offset = state_row * DIM + column[None, :, None, :]
    is_own_part = (lane_row % NUM_SPLITS == split)[None, None, :, None]
    q_channel, k_channel = key_head * DIM + dim, (KEY_HEADS + key_head) * DIM + dim
    v_channel, z_channel = (2 * KEY_HEADS + head) * DIM + dim, channels + head * DIM + dim
    x_ptr += row * stride_b
    ba_ptr += row * ba_stride_b + head
    conv_ptr += row * channels * (CONV_KERNEL_SIZE - 1)
    q_new = _load_token(x_ptr, 0, tokens, stride_t, q_channel)
    k_new = _load_token(x_ptr, 0, tokens, stride_t, k_channel)
    v_new = _load_token(x_ptr, 0, tokens, stride_t, v_channel)
    z_new = _load_token(x_ptr, 0, tokens, stride_t, z_channel)
    beta_new = _load_token(ba_ptr, 0, tokens, ba_stride_t, 0)
    alpha_new = _load_token(ba_ptr, 0, tokens, ba_stride_t, VALUE_HEADS)
    q_history = _load_interleaved(conv_ptr, q_channel, CONV_KERNEL_SIZE - 1, CONV_KERNEL_SIZE - 1)
    k_history = _load_interleaved(conv_ptr, k_channel, CONV_KERNEL_SIZE - 1, CONV_KERNEL_SIZE - 1)
    v_history = _load_interleaved(conv_ptr, v_channel, CONV_KERNEL_SIZE - 1, CONV_KERNEL_SIZE - 1)
    q_conv = _load_interleaved(conv_weight_ptr, q_channel, CONV_KERNEL_SIZE, CONV_KERNEL_SIZE)
    k_conv = _load_interleaved(conv_weight_ptr, k_channel, CONV_KERNEL_SIZE, CONV_KERNEL_SIZE)
    v_conv = _load_interleaved(conv_weight_ptr, v_channel, CONV_KERNEL_SIZE, CONV_KERNEL_SIZE)
    decay_rate = -tl.exp(tl.load(a_log_ptr + head))
    dt_bias = tl.load(dt_bias_ptr + head)
    norm = 1 + tl.load(norm_ptr + dim)
    tl.debug_barrier()
    state = tl.load(delta_ptr + (row * VALUE_HEADS + head) * DIM * DIM + state_offset)
    tl.debug_barrier()
    dtype = out_ptr.dtype.element_ty
    for t in range(tokens):
        q, k = (
            _convolve(q_history, q_new, q_conv, CONV_KERNEL_SIZE),
            _convolve(k_history, k_new, k_conv, CONV_KERNEL_SIZE),
        )
        v = _convolve(v_history, v_new, v_conv, CONV_KERNEL_SIZE).to(dtype).to(tl.float32)
        q_norm, k_norm = tl.reduce((q * q, k * k), 0, _add_pairs)
        q = (q * tl.rsqrt(q_norm + 1e-6)).to(dtype).to(tl.float32) * scale
        k = (k * tl.rsqrt(k_norm + 1e-6)).to(dtype).to(tl.float32)
        dt = alpha_new + dt_bias
        dt = tl.where(dt > 20, dt, tl.log(1 + tl.exp(tl.minimum(dt, 20.0))))
        beta, gate = tl.sigmoid(beta_new), norm * z_new * tl.sigmoid(z_new)
        q_history, k_history = (
            _shift_history(q_history, q_new, CONV_KERNEL_SIZE),
            _shift_history(k_history, k_new, CONV_KERNEL_SIZE),
        )
        v_history = _shift_history(v_history, v_new, CONV_KERNEL_SIZE)
        q_new = _load_token(x_ptr, t + 1, tokens, stride_t, q_channel)
        k_new = _load_token(x_ptr, t + 1, tokens, stride_t, k_channel)
        v_new = _load_token(x_ptr, t + 1, tokens, stride_t, v_channel)
        z_new = _load_token(x_ptr, t + 1, tokens, stride_t, z_channel)
        beta_new = _load_token(ba_ptr, t + 1, tokens, ba_stride_t, 0)
        alpha_new = _load_token(ba_ptr, t + 1, tokens, ba_stride_t, VALUE_HEADS)

        q, k = _broadcast_rows(q, LANES, rows_per_lane), _broadcast_rows(k, LANES, rows_per_lane)
        state *= tl.exp(decay_rate * dt)
        correction = (tl.reshape(v, [NUM_WARPS, width]) - _sum_rows(k * state)) * beta
        state += k * correction[None, :, None, :]
        o = tl.reshape(_sum_rows(q * state).to(dtype).to(tl.float32), [DIM])
        offset = row * tokens + t
        state_ptr = delta_out_ptr + (offset * VALUE_HEADS + head) * DIM * DIM + state_offset
        tl.store(state_ptr, state, mask=is_own_part)
        y = o * tl.rsqrt(tl.sum(o * o, axis=0) / DIM + eps) * gate
        if split == 0:
            out_offset = (t * tl.num_programs(2) + row) * VALUE_HEADS + head
            tl.store(out_ptr + out_offset * DIM + dim, y.to(dtype))
            history_ptr = conv_out_ptr + offset * channels * (CONV_KERNEL_SIZE - 1)
            _store_history(history_ptr, v_channel, v_history, CONV_KERNEL_SIZE)
            if head % group == 0:
                _store_history(history_ptr, q_channel, q_history, CONV_KERNEL_SIZE)
                _store_history(history_ptr, k_channel, k_history, CONV_KERNEL_SIZE)


def decode_gated_delta(
    qkvz_TBX: Tensor,
    beta_alpha_TBX: Tensor,
    weights: DeltaWeights,
    heads: DeltaHeads,
    conv_BCK: Tensor,
    delta_BHKV: Tensor,
    states: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel; arguments and returns as `gated_delta.decode_gated_delta`, whose `out` is `states`."""
    tokens, batch, _ = qkvz_TBX.shape
    dim, conv_kernel_size = heads.value_dim, weights.conv_weight_CK.shape[1]
    assert qkvz_TBX.stride(2) == beta_alpha_TBX.stride(2) == 1
    out = qkvz_TBX.new_empty(tokens, batch, heads.value_heads * dim)
    if states is None:
        num_states = batch * tokens
        states = (
            conv_BCK.new_empty(num_states, *conv_BCK.shape[1:]),
            delta_BHKV.new_empty(num_states, *delta_BHKV.shape[1:]),
        )
    conv_out, delta_out = states
    for source, target in ((conv_BCK, conv_out), (delta_BHKV, delta_out)):
        is_separate = target.data_ptr() != source.data_ptr() or not len(source)
        # several programs read what one of them writes
        assert is_separate, "the returned states must not share memory with the input states"
    assert conv_out.is_contiguous()
    assert delta_out.is_contiguous()
    blocks = block_sizes(dim, heads.value_heads * batch)
    _decode_gated_delta_kernel[(blocks["NUM_SPLITS"], heads.value_heads, batch)](
        qkvz_TBX,
        beta_alpha_TBX,
        weights.conv_weight_CK.contiguous(),
        weights.a_log_H,
        weights.dt_bias_H,
        weights.norm_V,
        conv_BCK.contiguous(),
        delta_BHKV.contiguous(),
        out,
        conv_out,
        delta_out,
        tokens,
        qkvz_TBX.stride(0),
        qkvz_TBX.stride(1),
        beta_alpha_TBX.stride(0),
        beta_alpha_TBX.stride(1),
        dim**-0.5,
        heads.eps,
        KEY_HEADS=heads.key_heads,
        VALUE_HEADS=heads.value_heads,
        DIM=dim,
        CONV_KERNEL_SIZE=conv_kernel_size,
        **blocks,
        num_warps=blocks["NUM_WARPS"],
    )
    return out, conv_out, delta_out


def block_sizes(dim: int, num_states: int) -> dict[str, int]:
    """Return the layout of a state over threads, and over how many programs the writing of a state is split."""
    width = min(dim, _COLUMNS_PER_WARP)
    # lanes along the rows, of 32; along the columns each lane has 16 bytes
    lanes = min(dim, 128 // width)
    num_splits = max(1, min(_MAX_SPLITS, _TARGET_PROGRAMS // max(1, num_states), dim // lanes))
    return {"LANES": lanes, "NUM_WARPS": dim // width, "NUM_SPLITS": 1 << num_splits.bit_length() - 1}
