# mypy: allow-untyped-defs
"""What stands before the delta rule, in one pass: convolution + SiLU + split + L2-norm, and the gates.

The projection's output is sequence-first [T,B,X] with rows q|k|v|z; the rule wants q, k, v batch-first
and contiguous. Composed from torch operations that is about ten passes over 2·Hk·K + Hv·V channels;
here it is one read and one write each way. z is not touched.

One program walks along WALK tokens of a few heads of one row, a token at a time, and keeps in registers what the
convolution reaches back to: the last three inputs forward, and backward also what the gradients of the last three
inputs have gathered so far. So nothing is read twice but three tokens a walk, a norm's sum stays inside
a warp, and the taps' own gradients are added up element by element, one share a walk, shares in a fixed order. The
compiler loads STAGES tokens ahead into shared memory, but only in loops that hand nothing on unchanged: hence
`x + 0.0`, which it keeps.

T tokens, B rows, X projection channels, C = q|k|v channels, Hk/Hv key/value heads, D head dim.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# H200, 16,384 tokens of 16/32 heads: forward 0.174 ms (0.183 with 4 heads, 0.214 without loading ahead), backward
# 0.313 (0.332 with 4 heads, 0.432 without loading ahead; 0.576 with four tokens written out a step). What a pass over
# blocks of 32 tokens by shifted loads took: 0.194, and 0.637 for two kernels backward.
_FORWARD = {"WALK": 64, "STAGES": 4}
_BACKWARD = {"WALK": 128, "STAGES": 4}
_HEADS, _WARPS = 8, 4  # of one program


@dataclass(frozen=True)
class DeltaShape:
    """Heads and their size: query and key have `key_heads`, value `value_heads`, all of `head_dim`."""

    key_heads: int
    value_heads: int
    head_dim: int

    @property
    def heads(self) -> int:
        """Heads of q, k and v together."""
        return 2 * self.key_heads + self.value_heads

    @property
    def channels(self) -> int:
        """Channels of q|k|v."""
        return self.heads * self.head_dim


@triton.jit
def _programs_heads(KEY_HEADS: tl.constexpr, HEADS: tl.constexpr):
    """Return the first of this program's heads, whether it is a query's or key's, and its number among its kind."""
    first = tl.program_id(0) * HEADS
    in_kind = tl.where(first < 2 * KEY_HEADS, first % KEY_HEADS, first - 2 * KEY_HEADS)
    return first, first < 2 * KEY_HEADS, in_kind


@triton.jit
def _taps(weight_ptr, channel):
    """Load the taps of these channels, the present token's first."""
    w0 = tl.load(weight_ptr + channel * 4 + 3).to(tl.float32)
    w1 = tl.load(weight_ptr + channel * 4 + 2).to(tl.float32)
    w2 = tl.load(weight_ptr + channel * 4 + 1).to(tl.float32)
    w3 = tl.load(weight_ptr + channel * 4).to(tl.float32)
    return w0, w1, w2, w3


@triton.jit
def _inputs_before(x_ptr, t, stride_t):
    """Load what stands one, two and three tokens before the walk that starts at t; zero before the row."""
    exists = t > 0
    x1 = tl.load(x_ptr + (t - 1) * stride_t, mask=exists, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + (t - 2) * stride_t, mask=exists, other=0.0).to(tl.float32)
    x3 = tl.load(x_ptr + (t - 3) * stride_t, mask=exists, other=0.0).to(tl.float32)
    return x1, x2, x3


@triton.jit
def _within(position, x1, x2, x3, PACKED: tl.constexpr):
    """Keep of three values that belong one, two and three tokens back those whose token is of the same document."""
    if PACKED:
        x1 = tl.where(position >= 1, x1, 0.0)
        x2 = tl.where(position >= 2, x2, 0.0)
        x3 = tl.where(position >= 3, x3, 0.0)
    return x1, x2, x3


@triton.jit
def _forward_walk(
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
    NORMED: tl.constexpr,
    PACKED: tl.constexpr,
    WALK: tl.constexpr,
    STAGES: tl.constexpr,
):
    w0, w1, w2, w3 = _taps(weight_ptr, channel)
    x1, x2, x3 = _inputs_before(x_ptr, start, stride_t)
    for step in tl.range(0, WALK, num_stages=STAGES):
        t = start + step
        exists = t < tokens
        x0 = tl.load(x_ptr + t * stride_t, mask=exists, other=0.0).to(tl.float32)
        position = tl.load(position_ptr + t, mask=exists, other=0) if PACKED else 0
        y1, y2, y3 = _within(position, x1, x2, x3, PACKED)
        mixed = x0 * w0 + y1 * w1 + y2 * w2 + y3 * w3
        y = mixed * tl.sigmoid(mixed)
        if NORMED:
            y = y * tl.rsqrt(tl.sum(y * y, axis=1) + eps)[:, None]
        tl.store(out_ptr + t * out_stride_t, y.to(out_ptr.dtype.element_ty), mask=exists)
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
    WALK: tl.constexpr,
    STAGES: tl.constexpr,
):
    first, is_normed, in_kind = _programs_heads(KEY_HEADS, HEADS)
    row, start = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64) * WALK
    place = tl.arange(0, HEADS)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    channel = first * DIM + place
    x_ptr += row * stride_b + channel
    if is_normed:
        out_ptr = tl.where(first < KEY_HEADS, q_ptr, k_ptr)
        out_ptr += (row * tokens * KEY_HEADS + in_kind) * DIM + place
        _forward_walk(
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
            WALK,
            STAGES,
        )
    else:
        out_ptr = v_ptr + (row * tokens * VALUE_HEADS + in_kind) * DIM + place
        _forward_walk(
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
            WALK,
            STAGES,
        )


@triton.jit
def _backward_walk(
    x_ptr,
    weight_ptr,
    position_ptr,
    d_ptr,
    dx_ptr,
    share_ptr,
    channel,
    channels,
    start,
    tokens,
    x_stride_t,
    d_stride_t,
    dx_stride_t,
    eps,
    NORMED: tl.constexpr,
    PACKED: tl.constexpr,
    WALK: tl.constexpr,
    STAGES: tl.constexpr,
):
    w0, w1, w2, w3 = _taps(weight_ptr, channel)
    x1, x2, x3 = _inputs_before(x_ptr, start, x_stride_t)
    sum0 = tl.zeros(channel.shape, tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    due1, due2, due3 = sum0, sum0, sum0  # what d(x) of one, two and three tokens back has gathered
    # the next walk's first three tokens reach back into this one
    for step in tl.range(0, WALK + 3, num_stages=STAGES):
        t = start + step
        exists = t < tokens
        x0 = tl.load(x_ptr + t * x_stride_t, mask=exists, other=0.0).to(tl.float32)
        d = tl.load(d_ptr + t * d_stride_t, mask=exists, other=0.0).to(tl.float32)
        position = tl.load(position_ptr + t, mask=exists, other=0) if PACKED else 0
        y1, y2, y3 = _within(position, x1, x2, x3, PACKED)
        mixed = x0 * w0 + y1 * w1 + y2 * w2 + y3 * w3
        gate = tl.sigmoid(mixed)
        if NORMED:
            y = mixed * gate
            scale = tl.rsqrt(tl.sum(y * y, axis=1) + eps)[:, None]
            # y' = y·s, s = (Σy² + ε)^-½:  dy = s·d - s³·y·(d·y)
            d = scale * (d - scale * scale * tl.sum(d * y, axis=1)[:, None] * y)
        d = d * gate * (1 + mixed * (1 - gate))
        d1, d2, d3 = _within(position, d, d, d, PACKED)
        behind = t - 3
        tl.store(
            dx_ptr + behind * dx_stride_t,
            (due3 + d3 * w3).to(dx_ptr.dtype.element_ty),
            mask=(step >= 3) & (behind < tokens),
        )
        due3, due2, due1 = due2 + d2 * w2, due1 + d1 * w1, d * w0
        mine = tl.where(step < WALK, d, 0.0)
        sum0 += mine * x0
        sum1 += mine * y1
        sum2 += mine * y2
        sum3 += mine * y3
        x3, x2, x1 = x2 + 0.0, x1 + 0.0, x0
    tl.store(share_ptr + 3 * channels + channel, sum0)
    tl.store(share_ptr + 2 * channels + channel, sum1)
    tl.store(share_ptr + channels + channel, sum2)
    tl.store(share_ptr + channel, sum3)


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
    WALK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """From d(q, k, v) to d(x): that of the convolution's output at t goes to t, t-1, t-2 and t-3, by the taps."""
    first, is_normed, in_kind = _programs_heads(KEY_HEADS, HEADS)
    row, start = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64) * WALK
    place = tl.arange(0, HEADS)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    channel = first * DIM + place
    x_ptr += row * x_stride_b + channel
    dx_ptr += row * dx_stride_b + channel
    share = row * tl.num_programs(1) + tl.program_id(1)
    channels = (2 * KEY_HEADS + VALUE_HEADS) * DIM
    share_ptr = dweight_ptr + share * channels * 4
    if is_normed:
        d_ptr = tl.where(first < KEY_HEADS, dq_ptr, dk_ptr)
        d_ptr += (row * tokens * KEY_HEADS + in_kind) * DIM + place
        _backward_walk(
            x_ptr,
            weight_ptr,
            position_ptr,
            d_ptr,
            dx_ptr,
            share_ptr,
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
            WALK,
            STAGES,
        )
    else:
        d_ptr = dv_ptr + (row * tokens * VALUE_HEADS + in_kind) * DIM + place
        _backward_walk(
            x_ptr,
            weight_ptr,
            position_ptr,
            d_ptr,
            dx_ptr,
            share_ptr,
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
            WALK,
            STAGES,
        )


@triton.jit
def _delta_gates_kernel(
    ba_ptr,
    a_log_ptr,
    dt_bias_ptr,
    decay_ptr,
    beta_ptr,
    tokens,
    rows,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.arange(0, BLOCK_H)
    mask = (n < tokens * rows)[:, None] & (h < HEADS)[None, :]
    source = n.to(tl.int64)[:, None] * (2 * HEADS) + h[None, :]
    target = ((n % rows).to(tl.int64) * tokens + n // rows)[:, None] * HEADS + h[None, :]
    beta = tl.sigmoid(tl.load(ba_ptr + source, mask=mask, other=0.0).to(tl.float32))
    tl.store(beta_ptr + target, beta.to(beta_ptr.dtype.element_ty), mask=mask)
    alpha = tl.load(ba_ptr + source + HEADS, mask=mask, other=0.0).to(tl.float32)
    a = tl.exp(tl.load(a_log_ptr + h, mask=h < HEADS, other=0.0))
    z = alpha + tl.load(dt_bias_ptr + h, mask=h < HEADS, other=0.0)[None, :]
    softplus = tl.where(z > 20.0, z, tl.log(1 + tl.exp(tl.minimum(z, 20.0))))
    tl.store(decay_ptr + target, -a[None, :] * softplus, mask=mask)


@triton.jit
def _delta_gates_backward_kernel(
    ba_ptr,
    a_log_ptr,
    dt_bias_ptr,
    ddecay_ptr,
    dbeta_ptr,
    dba_ptr,
    da_log_ptr,
    ddt_bias_ptr,
    tokens,
    rows,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.arange(0, BLOCK_H)
    mask = (n < tokens * rows)[:, None] & (h < HEADS)[None, :]
    source = n.to(tl.int64)[:, None] * (2 * HEADS) + h[None, :]
    target = ((n % rows).to(tl.int64) * tokens + n // rows)[:, None] * HEADS + h[None, :]
    beta = tl.sigmoid(tl.load(ba_ptr + source, mask=mask, other=0.0).to(tl.float32))
    dbeta = tl.load(dbeta_ptr + target, mask=mask, other=0.0).to(tl.float32)
    tl.store(dba_ptr + source, (dbeta * beta * (1 - beta)).to(dba_ptr.dtype.element_ty), mask=mask)
    alpha = tl.load(ba_ptr + source + HEADS, mask=mask, other=0.0).to(tl.float32)
    a = tl.exp(tl.load(a_log_ptr + h, mask=h < HEADS, other=0.0))
    z = alpha + tl.load(dt_bias_ptr + h, mask=h < HEADS, other=0.0)[None, :]
    softplus = tl.where(z > 20.0, z, tl.log(1 + tl.exp(tl.minimum(z, 20.0))))
    ddecay = tl.load(ddecay_ptr + target, mask=mask, other=0.0).to(tl.float32)
    dz = -a[None, :] * tl.sigmoid(z) * ddecay
    tl.store(dba_ptr + source + HEADS, dz.to(dba_ptr.dtype.element_ty), mask=mask)
    share = tl.program_id(0) * HEADS + h
    tl.store(ddt_bias_ptr + share, tl.sum(dz, axis=0), mask=h < HEADS)
    tl.store(da_log_ptr + share, tl.sum(-a[None, :] * softplus * ddecay, axis=0), mask=h < HEADS)


def delta_inputs(
    qkvz_TBX: Tensor, conv_weight_CK: Tensor, position_T: Tensor | None, shape: DeltaShape, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve, activate, split and normalise.

    Shapes: projection [T,B,X] with X ≥ C contiguous; taps [C,K]; position in the document [T] int32, for packed rows.
    Returns: query, key [B,T,Hk,D] of unit length, value [B,T,Hv,D].
    """
    tokens, rows = qkvz_TBX.shape[:2]
    assert qkvz_TBX.stride(-1) == 1
    assert conv_weight_CK.shape[1] == 4, "the fused convolution has four taps, as Qwen3-Next's"
    new = lambda heads: qkvz_TBX.new_empty(rows, tokens, heads, shape.head_dim)
    query, key, value = new(shape.key_heads), new(shape.key_heads), new(shape.value_heads)
    heads = _heads_together(shape)
    _delta_inputs_kernel[(shape.heads // heads, triton.cdiv(tokens, _FORWARD["WALK"]), rows)](
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
    """Write the gradient of q|k|v into the first C channels of `dqkvz`; return that of the taps [C,K] in fp32."""
    tokens, rows = qkvz_TBX.shape[:2]
    walks, heads = triton.cdiv(tokens, _BACKWARD["WALK"]), _heads_together(shape)
    shares = qkvz_TBX.new_empty(rows * walks, 4, shape.channels, dtype=torch.float32)
    _delta_inputs_backward_kernel[(shape.heads // heads, walks, rows)](
        qkvz_TBX,
        conv_weight_CK,
        position_T,
        dquery.contiguous(),
        dkey.contiguous(),
        dvalue.contiguous(),
        dqkvz_TBX,
        shares,
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
    return shares.sum(0).T


def _heads_together(shape: DeltaShape) -> int:
    """Return how many heads a program takes: all of one kind, so as many as divide both kinds'."""
    return math.gcd(_HEADS, shape.key_heads, shape.value_heads)


def delta_gates(
    beta_alpha_TBX: Tensor, a_log_H: Tensor, dt_bias_H: Tensor, beta_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the decay -exp(A)·softplus(α + dt) (fp32) and β's sigmoid, both [B,T,Hv]."""
    tokens, rows, width = beta_alpha_TBX.shape
    heads = width // 2
    decay = beta_alpha_TBX.new_empty(rows, tokens, heads, dtype=torch.float32)
    beta = beta_alpha_TBX.new_empty(rows, tokens, heads, dtype=beta_dtype)
    _delta_gates_kernel[(triton.cdiv(tokens * rows, 64),)](
        beta_alpha_TBX,
        a_log_H,
        dt_bias_H,
        decay,
        beta,
        tokens,
        rows,
        HEADS=heads,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_N=64,
    )
    return decay, beta


def delta_gates_backward(
    beta_alpha_TBX: Tensor, a_log_H: Tensor, dt_bias_H: Tensor, ddecay: Tensor, dbeta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of β|α [T,B,2·Hv], A_log and dt_bias (fp32)."""
    tokens, rows, width = beta_alpha_TBX.shape
    heads, blocks = width // 2, triton.cdiv(tokens * rows, 64)
    dba = torch.empty_like(beta_alpha_TBX)
    da_log, ddt_bias = (beta_alpha_TBX.new_empty(blocks, heads, dtype=torch.float32) for _ in "at")
    _delta_gates_backward_kernel[(blocks,)](
        beta_alpha_TBX,
        a_log_H,
        dt_bias_H,
        ddecay.contiguous(),
        dbeta.contiguous(),
        dba,
        da_log,
        ddt_bias,
        tokens,
        rows,
        HEADS=heads,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_N=64,
    )
    return dba, da_log.sum(0), ddt_bias.sum(0)
