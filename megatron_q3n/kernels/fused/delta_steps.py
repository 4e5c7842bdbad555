"""A few tokens of Gated DeltaNet from a carried state, in one launch: convolution, gates, rule and gated norm.

One program has one value head of one sequence: its state, a [K,V] matrix, stays in registers while
the tokens pass, and is written out after each. The convolution is done again by every value head of
a key head, which costs a few loads; its carried inputs are written by the first.

Everything is fp32 inside; q, k, v and the rule's output are rounded to the projection's format where
the composed form stores them, so that both say the same.

T tokens, B sequences, Hk/Hv key/value heads, D head dim (a power of two), TAPS of the convolution.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_q3n.kernels.delta_mixer import DeltaHeads, DeltaWeights


@triton.jit
def _convolved(
    x_ptr, conv_ptr, taps_ptr, t, stride_t, channel, TAPS: tl.constexpr, DIM: tl.constexpr
):
    """SiLU of the convolution at token t over some channels; tokens before 0 are the carried ones."""
    total = tl.zeros([DIM], tl.float32)
    for back in tl.static_range(TAPS):
        source = t - back
        new = tl.load(x_ptr + source * stride_t + channel, mask=source >= 0, other=0.0)
        place = channel * (TAPS - 1) + TAPS - 1 + source
        carried = tl.load(conv_ptr + place, mask=source < 0, other=0.0)
        x = new.to(tl.float32) + carried.to(tl.float32)
        total += x * tl.load(taps_ptr + channel * TAPS + TAPS - 1 - back).to(tl.float32)
    return total * tl.sigmoid(total)


@triton.jit
def _carry(x_ptr, conv_ptr, out_ptr, t, stride_t, channel, TAPS: tl.constexpr):
    """Write the last inputs up to token t of some channels."""
    for j in tl.static_range(TAPS - 1):
        source = t - (TAPS - 2) + j
        new = tl.load(x_ptr + source * stride_t + channel, mask=source >= 0, other=0.0)
        place = channel * (TAPS - 1) + TAPS - 1 + source
        carried = tl.load(conv_ptr + place, mask=source < 0, other=0.0)
        x = new.to(tl.float32) + carried.to(tl.float32)
        tl.store(out_ptr + channel * (TAPS - 1) + j, x.to(out_ptr.dtype.element_ty))


@triton.jit
def _unit(x):
    return x * tl.rsqrt(tl.sum(x * x, axis=0) + 1e-6)


@triton.jit
def _kernel(
    x_ptr, ba_ptr, taps_ptr, a_log_ptr, dt_bias_ptr, norm_ptr, conv_ptr, delta_ptr,
    out_ptr, conv_out_ptr, delta_out_ptr,
    tokens, stride_t, stride_b, ba_stride_t, ba_stride_b, scale, eps,
    KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, DIM: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group: tl.constexpr = VALUE_HEADS // KEY_HEADS
    channels: tl.constexpr = (2 * KEY_HEADS + VALUE_HEADS) * DIM
    key_head, dim = head // group, tl.arange(0, DIM)
    q_channel, k_channel = key_head * DIM + dim, (KEY_HEADS + key_head) * DIM + dim
    v_channel = (2 * KEY_HEADS + head) * DIM + dim
    x_ptr += row * stride_b
    ba_ptr += row * ba_stride_b
    conv_ptr += row * channels * (TAPS - 1)
    square = dim[:, None] * DIM + dim[None, :]
    state = tl.load(delta_ptr + (row * VALUE_HEADS + head) * DIM * DIM + square)
    decay_rate = -tl.exp(tl.load(a_log_ptr + head))
    dt_bias = tl.load(dt_bias_ptr + head)
    norm = 1 + tl.load(norm_ptr + dim)
    for t in range(tokens):
        q = _unit(_convolved(x_ptr, conv_ptr, taps_ptr, t, stride_t, q_channel, TAPS, DIM))
        k = _unit(_convolved(x_ptr, conv_ptr, taps_ptr, t, stride_t, k_channel, TAPS, DIM))
        v = _convolved(x_ptr, conv_ptr, taps_ptr, t, stride_t, v_channel, TAPS, DIM)
        q = q.to(out_ptr.dtype.element_ty).to(tl.float32) * scale
        k = k.to(out_ptr.dtype.element_ty).to(tl.float32)
        v = v.to(out_ptr.dtype.element_ty).to(tl.float32)
        beta = tl.sigmoid(tl.load(ba_ptr + t * ba_stride_t + head).to(tl.float32))
        step = tl.load(ba_ptr + t * ba_stride_t + VALUE_HEADS + head).to(tl.float32) + dt_bias
        step = tl.where(step > 20, step, tl.log(1 + tl.exp(tl.minimum(step, 20.0))))
        state = state * tl.exp(decay_rate * step)
        correction = (v - tl.sum(k[:, None] * state, axis=0)) * beta
        state += k[:, None] * correction[None, :]
        o = tl.sum(q[:, None] * state, axis=0).to(out_ptr.dtype.element_ty).to(tl.float32)
        place = row * tokens + t
        tl.store(delta_out_ptr + (place * VALUE_HEADS + head) * DIM * DIM + square, state)
        z = tl.load(x_ptr + t * stride_t + channels + head * DIM + dim).to(tl.float32)
        y = o * tl.rsqrt(tl.sum(o * o, axis=0) / DIM + eps) * norm * z * tl.sigmoid(z)
        out_place = (t * tl.num_programs(1) + row) * VALUE_HEADS + head
        tl.store(out_ptr + out_place * DIM + dim, y.to(out_ptr.dtype.element_ty))
        carried_ptr = conv_out_ptr + place * channels * (TAPS - 1)
        _carry(x_ptr, conv_ptr, carried_ptr, t, stride_t, v_channel, TAPS)
        if head % group == 0:
            _carry(x_ptr, conv_ptr, carried_ptr, t, stride_t, q_channel, TAPS)
            _carry(x_ptr, conv_ptr, carried_ptr, t, stride_t, k_channel, TAPS)


def delta_steps(
    qkvz_TBX: Tensor, beta_alpha_TBX: Tensor, weights: DeltaWeights, heads: DeltaHeads,
    conv_BCK: Tensor, delta_BHKV: Tensor, states: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Mix T tokens of B sequences; shapes and returns as `kernels.delta_steps`, whose `out` is `states`."""
    tokens, batch, _ = qkvz_TBX.shape
    dim, taps = heads.value_dim, weights.taps_CK.shape[1]
    assert qkvz_TBX.stride(2) == beta_alpha_TBX.stride(2) == 1
    out = qkvz_TBX.new_empty(tokens, batch, heads.value_heads * dim)
    if states is None:
        each = batch * tokens
        states = (
            conv_BCK.new_empty(each, *conv_BCK.shape[1:]),
            delta_BHKV.new_empty(each, *delta_BHKV.shape[1:]),
        )
    conv_out, delta_out = states
    assert conv_out.is_contiguous()
    assert delta_out.is_contiguous()
    _kernel[(heads.value_heads, batch)](
        qkvz_TBX, beta_alpha_TBX, weights.taps_CK.contiguous(), weights.a_log_H, weights.dt_bias_H,
        weights.norm_V, conv_BCK.contiguous(), delta_BHKV.contiguous(), out, conv_out, delta_out,
        tokens, qkvz_TBX.stride(0), qkvz_TBX.stride(1), beta_alpha_TBX.stride(0), beta_alpha_TBX.stride(1),
        dim**-0.5, heads.eps,
        KEY_HEADS=heads.key_heads, VALUE_HEADS=heads.value_heads, DIM=dim, TAPS=taps,
        num_warps=8 if dim >= 128 else 4,
    )  # fmt: skip
    return out, conv_out, delta_out
