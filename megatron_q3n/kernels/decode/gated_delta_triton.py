# mypy: allow-untyped-defs
"""A few tokens of Gated DeltaNet from a carried state, in one launch: convolution, gates, rule and gated norm.

One program has one value head of one sequence: its state, a [K,V] matrix, stays in registers while
the tokens pass, and is written out after each. What costs time is neither the bytes nor the sums but one wait
after the other, so little waits: all loads before the first token are under way together, a token's inputs are
loaded while the one before it is mixed, the convolution's last inputs stay in registers, and inside the rule no
warp waits for another, since each has some columns of the state, all rows of them in its lanes and registers.
Four warps are one for each of a multiprocessor's schedulers. While most multiprocessors are idle, several programs
do the same and each writes a part of the states (`SHARES`), for one multiprocessor takes some 0.6 µs to write a
matrix; the first writes all else.

The convolution is done again by every value head of a key head, which costs a few loads.

Everything is fp32 inside; q, k, v and the rule's output are rounded to the projection's format where
the composed form stores them, so that both say the same.

T tokens, B sequences, Hk/Hv key/value heads, D head dim (a power of two), TAPS of the convolution.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_q3n.kernels.gated_delta.mixer import DeltaHeads, DeltaWeights

_COLUMNS = 32  # of a warp: with heads of 128 a thread has 128 numbers of the state, a warp whole lines of memory
_PROGRAMS = 128  # about as many as there are multiprocessors: more share the states out only while some are idle
_MOST_SHARES = 4


@triton.jit
def _loaded(ptr, place, stride: tl.constexpr, COUNT: tl.constexpr):
    """Load vectors that lie interleaved, as fp32."""
    vectors = ()
    for j in tl.static_range(COUNT):
        vectors += (tl.load(ptr + place * stride + j).to(tl.float32),)  # type: ignore[assignment]
    return vectors


@triton.jit
def _convolved(before, x, taps, TAPS: tl.constexpr):
    """SiLU of the convolution over the inputs before a token and its own."""
    total = x * taps[TAPS - 1]
    for j in tl.static_range(TAPS - 1):
        total += before[j] * taps[j]
    return total * tl.sigmoid(total)


@triton.jit
def _later(before, x, TAPS: tl.constexpr):
    """Return the last TAPS - 1 inputs up to x."""
    after = ()
    for j in tl.static_range(1, TAPS - 1):
        after += (before[j],)  # type: ignore[assignment]
    after += (x,)  # type: ignore[assignment]
    return after


@triton.jit
def _keep(ptr, channel, inputs, TAPS: tl.constexpr):
    for j in tl.static_range(TAPS - 1):
        tl.store(ptr + channel * (TAPS - 1) + j, inputs[j].to(ptr.dtype.element_ty))


@triton.jit
def _new(ptr, t, tokens, stride_t, place):
    return tl.load(ptr + t * stride_t + place, mask=t < tokens, other=0.0).to(tl.float32)


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _along_rows(x, LANES: tl.constexpr, EACH: tl.constexpr):
    """Lay a vector along the rows of a state.

    Transposed, for the compiler does not see through that: it would make the vector in every thread that reads it.
    """
    return tl.trans(tl.reshape(x, [EACH, LANES]))[:, None, :, None]


@triton.jit
def _over_rows(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit(do_not_specialize=["tokens"])
def _kernel(
    x_ptr,
    ba_ptr,
    taps_ptr,
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
    TAPS: tl.constexpr,
    LANES: tl.constexpr,
    WARPS: tl.constexpr,
    SHARES: tl.constexpr,
):
    share, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group: tl.constexpr = VALUE_HEADS // KEY_HEADS
    channels: tl.constexpr = (2 * KEY_HEADS + VALUE_HEADS) * DIM
    each: tl.constexpr = DIM // LANES
    width: tl.constexpr = DIM // WARPS
    key_head, dim, part = head // group, tl.arange(0, DIM), tl.arange(0, each)
    column = tl.arange(0, WARPS)[:, None] * width + tl.arange(0, width)[None, :]
    state_row = part[None, None, :, None] * LANES + tl.arange(0, LANES)[:, None, None, None]
    square = state_row * DIM + column[None, :, None, :]
    is_mine = (part % SHARES == share)[None, None, :, None]
    q_channel, k_channel = key_head * DIM + dim, (KEY_HEADS + key_head) * DIM + dim
    v_channel, z_channel = (2 * KEY_HEADS + head) * DIM + dim, channels + head * DIM + dim
    x_ptr += row * stride_b
    ba_ptr += row * ba_stride_b + head
    conv_ptr += row * channels * (TAPS - 1)
    q_new = _new(x_ptr, 0, tokens, stride_t, q_channel)
    k_new = _new(x_ptr, 0, tokens, stride_t, k_channel)
    v_new = _new(x_ptr, 0, tokens, stride_t, v_channel)
    z_new = _new(x_ptr, 0, tokens, stride_t, z_channel)
    b_new = _new(ba_ptr, 0, tokens, ba_stride_t, 0)
    a_new = _new(ba_ptr, 0, tokens, ba_stride_t, VALUE_HEADS)
    q_before = _loaded(conv_ptr, q_channel, TAPS - 1, TAPS - 1)
    k_before = _loaded(conv_ptr, k_channel, TAPS - 1, TAPS - 1)
    v_before = _loaded(conv_ptr, v_channel, TAPS - 1, TAPS - 1)
    q_taps = _loaded(taps_ptr, q_channel, TAPS, TAPS)
    k_taps = _loaded(taps_ptr, k_channel, TAPS, TAPS)
    v_taps = _loaded(taps_ptr, v_channel, TAPS, TAPS)
    decay_rate = -tl.exp(tl.load(a_log_ptr + head))
    dt_bias = tl.load(dt_bias_ptr + head)
    norm = 1 + tl.load(norm_ptr + dim)
    tl.debug_barrier()
    state = tl.load(delta_ptr + (row * VALUE_HEADS + head) * DIM * DIM + square)
    tl.debug_barrier()
    rounded = out_ptr.dtype.element_ty
    for t in range(tokens):
        q, k = _convolved(q_before, q_new, q_taps, TAPS), _convolved(k_before, k_new, k_taps, TAPS)
        v = _convolved(v_before, v_new, v_taps, TAPS).to(rounded).to(tl.float32)
        q_square, k_square = tl.reduce((q * q, k * k), 0, _add_both)
        q = (q * tl.rsqrt(q_square + 1e-6)).to(rounded).to(tl.float32) * scale
        k = (k * tl.rsqrt(k_square + 1e-6)).to(rounded).to(tl.float32)
        step = a_new + dt_bias
        step = tl.where(step > 20, step, tl.log(1 + tl.exp(tl.minimum(step, 20.0))))
        beta, gate = tl.sigmoid(b_new), norm * z_new * tl.sigmoid(z_new)
        q_before, k_before = _later(q_before, q_new, TAPS), _later(k_before, k_new, TAPS)
        v_before = _later(v_before, v_new, TAPS)
        q_new = _new(x_ptr, t + 1, tokens, stride_t, q_channel)
        k_new = _new(x_ptr, t + 1, tokens, stride_t, k_channel)
        v_new = _new(x_ptr, t + 1, tokens, stride_t, v_channel)
        z_new = _new(x_ptr, t + 1, tokens, stride_t, z_channel)
        b_new = _new(ba_ptr, t + 1, tokens, ba_stride_t, 0)
        a_new = _new(ba_ptr, t + 1, tokens, ba_stride_t, VALUE_HEADS)

        q, k = _along_rows(q, LANES, each), _along_rows(k, LANES, each)
        state *= tl.exp(decay_rate * step)
        correction = (tl.reshape(v, [WARPS, width]) - _over_rows(k * state)) * beta
        state += k * correction[None, :, None, :]
        o = tl.reshape(_over_rows(q * state).to(rounded).to(tl.float32), [DIM])
        place = row * tokens + t
        square_ptr = delta_out_ptr + (place * VALUE_HEADS + head) * DIM * DIM + square
        tl.store(square_ptr, state, mask=is_mine)
        y = o * tl.rsqrt(tl.sum(o * o, axis=0) / DIM + eps) * gate
        if share == 0:
            out_place = (t * tl.num_programs(2) + row) * VALUE_HEADS + head
            tl.store(out_ptr + out_place * DIM + dim, y.to(rounded))
            kept_ptr = conv_out_ptr + place * channels * (TAPS - 1)
            _keep(kept_ptr, v_channel, v_before, TAPS)
            if head % group == 0:
                _keep(kept_ptr, q_channel, q_before, TAPS)
                _keep(kept_ptr, k_channel, k_before, TAPS)


def delta_steps(
    qkvz_TBX: Tensor,
    beta_alpha_TBX: Tensor,
    weights: DeltaWeights,
    heads: DeltaHeads,
    conv_BCK: Tensor,
    delta_BHKV: Tensor,
    states: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix T tokens of B sequences; shapes and returns as `kernels.delta_steps`, whose `out` is `states`."""
    tokens, batch, _ = qkvz_TBX.shape
    dim, taps = heads.value_dim, weights.taps_CK.shape[1]
    assert qkvz_TBX.stride(2) == beta_alpha_TBX.stride(2) == 1
    out = qkvz_TBX.new_empty(tokens, batch, heads.value_heads * dim)
    if states is None:
        each = batch * tokens
        states = (conv_BCK.new_empty(each, *conv_BCK.shape[1:]), delta_BHKV.new_empty(each, *delta_BHKV.shape[1:]))
    conv_out, delta_out = states
    for given, written in ((conv_BCK, conv_out), (delta_BHKV, delta_out)):
        apart = written.data_ptr() != given.data_ptr() or not len(given)
        assert apart, "several programs read what one of them would write"
    assert conv_out.is_contiguous()
    assert delta_out.is_contiguous()
    sizes = block_sizes(dim, heads.value_heads * batch)
    _kernel[(sizes["SHARES"], heads.value_heads, batch)](
        qkvz_TBX,
        beta_alpha_TBX,
        weights.taps_CK.contiguous(),
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
        TAPS=taps,
        **sizes,
        num_warps=sizes["WARPS"],
    )
    return out, conv_out, delta_out


def block_sizes(dim: int, matrices: int) -> dict[str, int]:
    """Return how a state is laid out over threads, and how many programs share out the writing of one."""
    width = min(dim, _COLUMNS)
    lanes = min(dim, 128 // width)  # of 32, those down the rows; along a row each has 16 bytes
    shares = max(1, min(_MOST_SHARES, _PROGRAMS // max(1, matrices), dim // lanes))
    return {"LANES": lanes, "WARPS": dim // width, "SHARES": 1 << shares.bit_length() - 1}
