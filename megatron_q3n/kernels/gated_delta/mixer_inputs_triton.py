# mypy: allow-untyped-defs
"""Prologue of the gated delta rule in one pass: causal conv1d + SiLU + split + L2 norm of q and k.

    y_t = SiLU(Σ_j w_j x_{t-j}), j < 4        q, k = y / sqrt(Σ y² + ε)

The projection's output is sequence-first [T,B,X] with channels q|k|v|z; the rule needs q, k, v batch-first and
contiguous. From torch operations that is about ten passes over 2·Hk·K + Hv·V channels; here it is one read and one
write in each direction. z is not touched.

Launch geometry: grid (head blocks, cdiv(T, TOKENS_PER_PROGRAM), B). One program processes TOKENS_PER_PROGRAM
consecutive tokens of HEADS heads of one row, a token at a time, and keeps in registers what the convolution needs of
earlier tokens: the last three inputs forward, and backward also the accumulated gradients of the last three inputs. So
only three tokens per program are read twice, the sum of a norm stays inside a warp, and the gradients of the conv
weight are accumulated element by element, one partial sum per program, added in a fixed order. The compiler prefetches
STAGES tokens into shared memory, but only in loops that carry no value over unchanged: hence `x + 0.0`, which it does
not remove.

T tokens, B rows, X projection channels, C = q|k|v channels, Hk/Hv key/value heads, D head dim.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_q3n.kernels.gated_delta.operands import DeltaShape

# H200, 16,384 tokens of 16/32 heads: forward 0.174 ms (0.183 with 4 heads, 0.214 without prefetch), backward 0.313
# (0.332 with 4 heads, 0.432 without prefetch; 0.576 with four tokens unrolled per step). A pass over blocks of 32
# tokens with shifted loads took 0.194, and 0.637 for two kernels backward.
_FORWARD = {"TOKENS_PER_PROGRAM": 64, "STAGES": 4}
_BACKWARD = {"TOKENS_PER_PROGRAM": 128, "STAGES": 4}
# of one program
_HEADS, _WARPS = 8, 4


@triton.jit
def _head_block(KEY_HEADS: tl.constexpr, HEADS: tl.constexpr):
    """Return this program's first head, true for a query or key head, and its index among q, k or v heads."""
    first = tl.program_id(0) * HEADS
    index_in_kind = tl.where(first < 2 * KEY_HEADS, first % KEY_HEADS, first - 2 * KEY_HEADS)
    return first, first < 2 * KEY_HEADS, index_in_kind


@triton.jit
def _load_conv_weight(weight_ptr, channel):
    """Load the conv weights of these channels, that of the current token first."""
    w0 = tl.load(weight_ptr + channel * 4 + 3).to(tl.float32)
    w1 = tl.load(weight_ptr + channel * 4 + 2).to(tl.float32)
    w2 = tl.load(weight_ptr + channel * 4 + 1).to(tl.float32)
    w3 = tl.load(weight_ptr + channel * 4).to(tl.float32)
    return w0, w1, w2, w3


@triton.jit
def _load_history(x_ptr, t, stride_t):
    """Load the inputs one, two and three tokens before t; zero before the row's start."""
    token_mask = t > 0
    x1 = tl.load(x_ptr + (t - 1) * stride_t, mask=token_mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + (t - 2) * stride_t, mask=token_mask, other=0.0).to(tl.float32)
    x3 = tl.load(x_ptr + (t - 3) * stride_t, mask=token_mask, other=0.0).to(tl.float32)
    return x1, x2, x3


@triton.jit
def _mask_other_documents(position, x1, x2, x3, PACKED: tl.constexpr):
    """Zero those of three values, one, two and three tokens back, whose token is in another document."""
    if PACKED:
        x1 = tl.where(position >= 1, x1, 0.0)
        x2 = tl.where(position >= 2, x2, 0.0)
        x3 = tl.where(position >= 3, x3, 0.0)
    return x1, x2, x3


@triton.jit
def _forward_tokens(
    x_ptr,
    weight_ptr,
    position_ptr,
    out_ptr,
    channel,
    start,
    tokens,
    stride_t,
    out_stride_t,
    eps,
    HAS_L2_NORM: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS_PER_PROGRAM: tl.constexpr,
    STAGES: tl.constexpr,
):
    w0, w1, w2, w3 = _load_conv_weight(weight_ptr, channel)
    x1, x2, x3 = _load_history(x_ptr, start, stride_t)
    for step in tl.range(0, TOKENS_PER_PROGRAM, num_stages=STAGES):
        t = start + step
        token_mask = t < tokens
        x0 = tl.load(x_ptr + t * stride_t, mask=token_mask, other=0.0).to(tl.float32)
        position = tl.load(position_ptr + t, mask=token_mask, other=0) if PACKED else 0
        y1, y2, y3 = _mask_other_documents(position, x1, x2, x3, PACKED)
        mixed = x0 * w0 + y1 * w1 + y2 * w2 + y3 * w3
        y = mixed * tl.sigmoid(mixed)
        if HAS_L2_NORM:
            y = y * tl.rsqrt(tl.sum(y * y, axis=1) + eps)[:, None]
        tl.store(out_ptr + t * out_stride_t, y.to(out_ptr.dtype.element_ty), mask=token_mask)
        x3, x2, x1 = x2 + 0.0, x1 + 0.0, x0


@triton.jit
def _delta_inputs_kernel(
    x_ptr,
    weight_ptr,
    position_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    tokens,
    stride_t,
    stride_b,
    eps,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PACKED: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS_PER_PROGRAM: tl.constexpr,
    STAGES: tl.constexpr,
):
    first, is_normed, index_in_kind = _head_block(KEY_HEADS, HEADS)
    row, start = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64) * TOKENS_PER_PROGRAM
    offset = tl.arange(0, HEADS)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    channel = first * DIM + offset
    x_ptr += row * stride_b + channel
    if is_normed:
        out_ptr = tl.where(first < KEY_HEADS, q_ptr, k_ptr)
        out_ptr += (row * tokens * KEY_HEADS + index_in_kind) * DIM + offset
        _forward_tokens(
            x_ptr,
            weight_ptr,
            position_ptr,
            out_ptr,
            channel,
            start,
            tokens,
            stride_t,
            KEY_HEADS * DIM,
            eps,
            True,
            PACKED,
            TOKENS_PER_PROGRAM,
            STAGES,
        )
    else:
        out_ptr = v_ptr + (row * tokens * VALUE_HEADS + index_in_kind) * DIM + offset
        _forward_tokens(
            x_ptr,
            weight_ptr,
            position_ptr,
            out_ptr,
            channel,
            start,
            tokens,
            stride_t,
            VALUE_HEADS * DIM,
            eps,
            False,
            PACKED,
            TOKENS_PER_PROGRAM,
            STAGES,
        )


@triton.jit
def _backward_tokens(
    x_ptr,
    weight_ptr,
    position_ptr,
    d_ptr,
    dx_ptr,
    partial_ptr,
    channel,
    channels,
    start,
    tokens,
    x_stride_t,
    d_stride_t,
    dx_stride_t,
    eps,
    HAS_L2_NORM: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS_PER_PROGRAM: tl.constexpr,
    STAGES: tl.constexpr,
):
    w0, w1, w2, w3 = _load_conv_weight(weight_ptr, channel)
    x1, x2, x3 = _load_history(x_ptr, start, x_stride_t)
    sum0 = tl.zeros(channel.shape, tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    # accumulated d(x) of the inputs one, two and three tokens back
    dx1, dx2, dx3 = sum0, sum0, sum0
    # the first three tokens of the next program contribute to inputs of this one
    for step in tl.range(0, TOKENS_PER_PROGRAM + 3, num_stages=STAGES):
        t = start + step
        token_mask = t < tokens
        x0 = tl.load(x_ptr + t * x_stride_t, mask=token_mask, other=0.0).to(tl.float32)
        d = tl.load(d_ptr + t * d_stride_t, mask=token_mask, other=0.0).to(tl.float32)
        position = tl.load(position_ptr + t, mask=token_mask, other=0) if PACKED else 0
        y1, y2, y3 = _mask_other_documents(position, x1, x2, x3, PACKED)
        mixed = x0 * w0 + y1 * w1 + y2 * w2 + y3 * w3
        gate = tl.sigmoid(mixed)
        if HAS_L2_NORM:
            y = mixed * gate
            scale = tl.rsqrt(tl.sum(y * y, axis=1) + eps)[:, None]
            # y' = y·s, s = (Σy² + ε)^-½:  dy = s·d - s³·y·(d·y)
            d = scale * (d - scale * scale * tl.sum(d * y, axis=1)[:, None] * y)
        d = d * gate * (1 + mixed * (1 - gate))
        d1, d2, d3 = _mask_other_documents(position, d, d, d, PACKED)
        t_out = t - 3
        tl.store(
            dx_ptr + t_out * dx_stride_t,
            (dx3 + d3 * w3).to(dx_ptr.dtype.element_ty),
            mask=(step >= 3) & (t_out < tokens),
        )
        dx3, dx2, dx1 = dx2 + d2 * w2, dx1 + d1 * w1, d * w0
        d_own = tl.where(step < TOKENS_PER_PROGRAM, d, 0.0)
        sum0 += d_own * x0
        sum1 += d_own * y1
        sum2 += d_own * y2
        sum3 += d_own * y3
        x3, x2, x1 = x2 + 0.0, x1 + 0.0, x0
    tl.store(partial_ptr + 3 * channels + channel, sum0)
    tl.store(partial_ptr + 2 * channels + channel, sum1)
    tl.store(partial_ptr + channels + channel, sum2)
    tl.store(partial_ptr + channel, sum3)


@triton.jit
def _delta_inputs_backward_kernel(
    x_ptr,
    weight_ptr,
    position_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dx_ptr,
    dweight_ptr,
    tokens,
    x_stride_t,
    x_stride_b,
    dx_stride_t,
    dx_stride_b,
    eps,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PACKED: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS_PER_PROGRAM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute d(x) from d(q, k, v): the gradient at t contributes to x at t, t-1, t-2 and t-3, by the conv weights."""
    first, is_normed, index_in_kind = _head_block(KEY_HEADS, HEADS)
    row, start = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64) * TOKENS_PER_PROGRAM
    offset = tl.arange(0, HEADS)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    channel = first * DIM + offset
    x_ptr += row * x_stride_b + channel
    dx_ptr += row * dx_stride_b + channel
    partial_index = row * tl.num_programs(1) + tl.program_id(1)
    channels = (2 * KEY_HEADS + VALUE_HEADS) * DIM
    partial_ptr = dweight_ptr + partial_index * channels * 4
    if is_normed:
        d_ptr = tl.where(first < KEY_HEADS, dq_ptr, dk_ptr)
        d_ptr += (row * tokens * KEY_HEADS + index_in_kind) * DIM + offset
        _backward_tokens(
            x_ptr,
            weight_ptr,
            position_ptr,
            d_ptr,
            dx_ptr,
            partial_ptr,
            channel,
            channels,
            start,
            tokens,
            x_stride_t,
            KEY_HEADS * DIM,
            dx_stride_t,
            eps,
            True,
            PACKED,
            TOKENS_PER_PROGRAM,
            STAGES,
        )
    else:
        d_ptr = dv_ptr + (row * tokens * VALUE_HEADS + index_in_kind) * DIM + offset
        _backward_tokens(
            x_ptr,
            weight_ptr,
            position_ptr,
            d_ptr,
            dx_ptr,
            partial_ptr,
            channel,
            channels,
            start,
            tokens,
            x_stride_t,
            VALUE_HEADS * DIM,
            dx_stride_t,
            eps,
            False,
            PACKED,
            TOKENS_PER_PROGRAM,
            STAGES,
        )


def delta_inputs(
    qkvz_TBX: Tensor, conv_weight_CK: Tensor, position_T: Tensor | None, shape: DeltaShape, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve, activate, split, and normalize q and k.

    Shapes: projection [T,B,X] with X ≥ C contiguous; conv weight [C,K]; position in the document [T]
        int32, for packed rows.
    Returns: query, key [B,T,Hk,D] of unit length, value [B,T,Hv,D].
    """
    tokens, rows = qkvz_TBX.shape[:2]
    assert qkvz_TBX.stride(-1) == 1
    assert conv_weight_CK.shape[1] == 4, "the fused convolution has kernel size 4, as in Qwen3-Next"
    new = lambda heads: qkvz_TBX.new_empty(rows, tokens, heads, shape.head_dim)
    query, key, value = new(shape.key_heads), new(shape.key_heads), new(shape.value_heads)
    heads = _heads_per_program(shape)
    _delta_inputs_kernel[(shape.heads // heads, triton.cdiv(tokens, _FORWARD["TOKENS_PER_PROGRAM"]), rows)](
        qkvz_TBX,
        conv_weight_CK,
        position_T,
        query,
        key,
        value,
        tokens,
        qkvz_TBX.stride(0),
        qkvz_TBX.stride(1),
        eps,
        KEY_HEADS=shape.key_heads,
        VALUE_HEADS=shape.value_heads,
        DIM=shape.head_dim,
        PACKED=position_T is not None,
        HEADS=heads,
        num_warps=min(heads, _WARPS),
        **_FORWARD,
    )
    return query, key, value


def delta_inputs_backward(
    qkvz_TBX: Tensor,
    conv_weight_CK: Tensor,
    position_T: Tensor | None,
    shape: DeltaShape,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    dqkvz_TBX: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """Write the gradient of q|k|v into the first C channels of `dqkvz`; return dconv_weight [C,K] in fp32."""
    tokens, rows = qkvz_TBX.shape[:2]
    num_token_blocks, heads = triton.cdiv(tokens, _BACKWARD["TOKENS_PER_PROGRAM"]), _heads_per_program(shape)
    partial_dweight = qkvz_TBX.new_empty(rows * num_token_blocks, 4, shape.channels, dtype=torch.float32)
    _delta_inputs_backward_kernel[(shape.heads // heads, num_token_blocks, rows)](
        qkvz_TBX,
        conv_weight_CK,
        position_T,
        dquery.contiguous(),
        dkey.contiguous(),
        dvalue.contiguous(),
        dqkvz_TBX,
        partial_dweight,
        tokens,
        qkvz_TBX.stride(0),
        qkvz_TBX.stride(1),
        dqkvz_TBX.stride(0),
        dqkvz_TBX.stride(1),
        eps,
        KEY_HEADS=shape.key_heads,
        VALUE_HEADS=shape.value_heads,
        DIM=shape.head_dim,
        PACKED=position_T is not None,
        HEADS=heads,
        num_warps=min(heads, _WARPS),
        **_BACKWARD,
    )
    return partial_dweight.sum(0).T


def _heads_per_program(shape: DeltaShape) -> int:
    """Return the number of heads per program: all of one kind, so a common divisor of both head counts."""
    return math.gcd(_HEADS, shape.key_heads, shape.value_heads)
