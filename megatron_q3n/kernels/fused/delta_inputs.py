"""What stands before the delta rule, in one pass: convolution + SiLU + split + L2-norm, and the gates.

The projection's output is sequence-first [T,B,X] with rows q|k|v|z; the rule wants q, k, v batch-first
and contiguous. Composed from torch operations that is about ten passes over 2·Hk·K + Hv·V channels;
here it is one read and one write forward, and two of each backward. z is not touched.

One program handles BLOCK_T tokens of one head of one row. The taps are four shifted loads of the
same tile: the first comes from memory, the others from cache. The backward pass first turns
gradients into those of the convolution's output (kernel one), then correlates them with the taps
(kernel two, which also gathers the taps' own gradients: one partial sum per program, added in a
fixed order).

T tokens, B rows, X projection channels, C = q|k|v channels, Hk/Hv key/value heads, D head dim.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_T = 32
_WALK_T, _BLOCKS_PER_WALK = 16, 16


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
def _convolved(
    x_base, weight_ptr, position, t, row_mask, channel, stride_t, TAPS: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Convolve one tile in fp32: x_base points at channel 0 of the row, t are tokens [BLOCK_T]."""
    total = tl.zeros((t.shape[0], channel.shape[0]), tl.float32)
    for back in tl.static_range(TAPS):
        seen = row_mask & (t >= back)
        if PACKED:
            seen = seen & (position >= back)
        x = tl.load(
            x_base + (t - back)[:, None] * stride_t + channel[None, :],
            mask=seen[:, None],
            other=0.0,
        )
        w = tl.load(weight_ptr + channel * TAPS + (TAPS - 1 - back))
        total += x.to(tl.float32) * w.to(tl.float32)[None, :]
    return total


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, position_ptr, q_ptr, k_ptr, v_ptr,
    tokens, stride_t, stride_b, eps,
    KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, DIM: tl.constexpr,
    TAPS: tl.constexpr, PACKED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    dim = tl.arange(0, DIM)
    row_mask = t < tokens
    position = tl.load(position_ptr + t, mask=row_mask, other=0) if PACKED else t
    mixed = _convolved(
        x_ptr + row * stride_b, weight_ptr, position, t.to(tl.int64), row_mask, head * DIM + dim, stride_t, TAPS, PACKED
    )  # fmt: skip
    y = mixed * tl.sigmoid(mixed)
    out_row = (row * tokens + t.to(tl.int64))[:, None]
    if head < 2 * KEY_HEADS:
        y = y * tl.rsqrt(tl.sum(y * y, axis=1) + eps)[:, None]
        out_ptr = q_ptr
        if head >= KEY_HEADS:
            out_ptr = k_ptr
        place = (out_row * KEY_HEADS + head % KEY_HEADS) * DIM + dim[None, :]
        tl.store(out_ptr + place, y.to(q_ptr.dtype.element_ty), mask=row_mask[:, None])
    else:
        place = (out_row * VALUE_HEADS + head - 2 * KEY_HEADS) * DIM + dim[None, :]
        tl.store(v_ptr + place, y.to(v_ptr.dtype.element_ty), mask=row_mask[:, None])


@triton.jit
def _backward_kernel(
    x_ptr, weight_ptr, position_ptr, dq_ptr, dk_ptr, dv_ptr, dmixed_ptr,
    tokens, stride_t, stride_b, eps,
    KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, DIM: tl.constexpr,
    TAPS: tl.constexpr, PACKED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """From d(q, k, v) to d(convolution output) [B,T,C]."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    dim = tl.arange(0, DIM)
    channel = head * DIM + dim
    row_mask = t < tokens
    position = tl.load(position_ptr + t, mask=row_mask, other=0) if PACKED else t
    t64 = t.to(tl.int64)
    mixed = _convolved(
        x_ptr + row * stride_b, weight_ptr, position, t64, row_mask, channel, stride_t, TAPS, PACKED
    )  # fmt: skip
    gate = tl.sigmoid(mixed)
    in_row = (row * tokens + t64)[:, None]
    if head < 2 * KEY_HEADS:
        d_ptr = dq_ptr
        if head >= KEY_HEADS:
            d_ptr = dk_ptr
        place = (in_row * KEY_HEADS + head % KEY_HEADS) * DIM + dim[None, :]
        d = tl.load(d_ptr + place, mask=row_mask[:, None], other=0.0).to(tl.float32)
        y = mixed * gate
        scale = tl.rsqrt(tl.sum(y * y, axis=1) + eps)[:, None]
        # y' = y·s, s = (Σy² + ε)^-½:  dy = s·d - s³·y·(d·y)
        d = scale * d - scale * scale * scale * y * tl.sum(d * y, axis=1)[:, None]
    else:
        place = (in_row * VALUE_HEADS + head - 2 * KEY_HEADS) * DIM + dim[None, :]
        d = tl.load(dv_ptr + place, mask=row_mask[:, None], other=0.0).to(tl.float32)
    d = d * gate * (1 + mixed * (1 - gate))
    channels: tl.constexpr = (2 * KEY_HEADS + VALUE_HEADS) * DIM
    tl.store(
        dmixed_ptr + in_row * channels + channel[None, :],
        d.to(dmixed_ptr.dtype.element_ty), mask=row_mask[:, None],
    )  # fmt: skip


@triton.jit
def _reached(
    dmixed_ptr, position_ptr, row, t, tokens, channel, AHEAD: tl.constexpr,
    CHANNELS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Load d(convolution output) of the tokens AHEAD of t, where they are of t's document; zero elsewhere."""
    later = t + AHEAD
    exists = later < tokens
    if PACKED:
        exists = exists & (tl.load(position_ptr + later, mask=exists, other=0) >= AHEAD)
    place = (row * tokens + later.to(tl.int64))[:, None] * CHANNELS + channel[None, :]
    return tl.load(dmixed_ptr + place, mask=exists[:, None], other=0.0).to(tl.float32)


@triton.jit
def _correlate_kernel(
    x_ptr, dmixed_ptr, weight_ptr, position_ptr, dx_ptr, dweight_ptr,
    tokens, x_stride_t, x_stride_b, stride_t, stride_b,
    CHANNELS: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """d(x) at t gathers d(convolution output) of t … t+3; a tap's own gradient is what its reach gathers, times x.

    One program walks BLOCKS blocks of tokens and adds the taps' products up element by element: the sum over tokens,
    which crosses warps, is taken once at the end (taken once a block, this kernel took 0.89 ms on an H200).
    """
    row = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    w0 = tl.load(weight_ptr + channel * 4 + 3).to(tl.float32)[None, :]
    w1 = tl.load(weight_ptr + channel * 4 + 2).to(tl.float32)[None, :]
    w2 = tl.load(weight_ptr + channel * 4 + 1).to(tl.float32)[None, :]
    w3 = tl.load(weight_ptr + channel * 4).to(tl.float32)[None, :]
    sum0 = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    sum1 = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    sum2 = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    sum3 = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for block in range(BLOCKS):
        t = (tl.program_id(0) * BLOCKS + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        t64, exists = t.to(tl.int64)[:, None], (t < tokens)[:, None]
        x = tl.load(
            x_ptr + row * x_stride_b + t64 * x_stride_t + channel[None, :], mask=exists, other=0.0
        ).to(tl.float32)
        d = _reached(dmixed_ptr, position_ptr, row, t, tokens, channel, 0, CHANNELS, PACKED)
        total = d * w0
        sum0 += d * x
        d = _reached(dmixed_ptr, position_ptr, row, t, tokens, channel, 1, CHANNELS, PACKED)
        total += d * w1
        sum1 += d * x
        d = _reached(dmixed_ptr, position_ptr, row, t, tokens, channel, 2, CHANNELS, PACKED)
        total += d * w2
        sum2 += d * x
        d = _reached(dmixed_ptr, position_ptr, row, t, tokens, channel, 3, CHANNELS, PACKED)
        total += d * w3
        sum3 += d * x
        place = row * stride_b + t64 * stride_t + channel[None, :]
        tl.store(dx_ptr + place, total.to(dx_ptr.dtype.element_ty), mask=exists)
    share = dweight_ptr + ((row * tl.num_programs(0) + tl.program_id(0)) * CHANNELS + channel) * 4
    tl.store(share + 3, tl.sum(sum0, axis=0))
    tl.store(share + 2, tl.sum(sum1, axis=0))
    tl.store(share + 1, tl.sum(sum2, axis=0))
    tl.store(share, tl.sum(sum3, axis=0))


@triton.jit
def _gates_kernel(
    ba_ptr, a_log_ptr, dt_bias_ptr, decay_ptr, beta_ptr, tokens, rows,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
def _gates_backward_kernel(
    ba_ptr, a_log_ptr, dt_bias_ptr, ddecay_ptr, dbeta_ptr, dba_ptr, da_log_ptr, ddt_bias_ptr, tokens, rows,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Convolve, activate, split and normalise.

    Shapes: projection [T,B,X] with X ≥ C contiguous; taps [C,K]; position in the document [T] int32, for packed rows.
    Returns: query, key [B,T,Hk,D] of unit length, value [B,T,Hv,D].
    """
    tokens, rows = qkvz_TBX.shape[:2]
    assert qkvz_TBX.stride(-1) == 1
    new = lambda heads: qkvz_TBX.new_empty(rows, tokens, heads, shape.head_dim)
    query, key, value = new(shape.key_heads), new(shape.key_heads), new(shape.value_heads)
    _forward_kernel[(triton.cdiv(tokens, _BLOCK_T), shape.heads, rows)](
        qkvz_TBX, conv_weight_CK, position_T, query, key, value,
        tokens, qkvz_TBX.stride(0), qkvz_TBX.stride(1), eps,
        KEY_HEADS=shape.key_heads, VALUE_HEADS=shape.value_heads, DIM=shape.head_dim,
        TAPS=conv_weight_CK.shape[1], PACKED=position_T is not None, BLOCK_T=_BLOCK_T, num_warps=4,
    )  # fmt: skip
    return query, key, value


def delta_inputs_backward(
    qkvz_TBX: Tensor, conv_weight_CK: Tensor, position_T: Tensor | None, shape: DeltaShape,
    dquery: Tensor, dkey: Tensor, dvalue: Tensor, dqkvz_TBX: Tensor, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """Write the gradient of q|k|v into the first C channels of `dqkvz`; return that of the taps [C,K] in fp32."""
    tokens, rows = qkvz_TBX.shape[:2]
    taps = conv_weight_CK.shape[1]
    blocks = triton.cdiv(tokens, _BLOCK_T)
    assert taps == 4, "the fused convolution has four taps, as Qwen3-Next's"
    walks = triton.cdiv(tokens, _WALK_T * _BLOCKS_PER_WALK)
    dmixed_BTC = qkvz_TBX.new_empty(rows, tokens, shape.channels)
    shares = qkvz_TBX.new_empty(rows * walks, shape.channels, taps, dtype=torch.float32)
    packed = position_T is not None
    _backward_kernel[(blocks, shape.heads, rows)](
        qkvz_TBX, conv_weight_CK, position_T, dquery.contiguous(), dkey.contiguous(), dvalue.contiguous(),
        dmixed_BTC, tokens, qkvz_TBX.stride(0), qkvz_TBX.stride(1), eps,
        KEY_HEADS=shape.key_heads, VALUE_HEADS=shape.value_heads, DIM=shape.head_dim,
        TAPS=taps, PACKED=packed, BLOCK_T=_BLOCK_T, num_warps=4,
    )  # fmt: skip
    _correlate_kernel[(walks, shape.heads, rows)](
        qkvz_TBX, dmixed_BTC, conv_weight_CK, position_T, dqkvz_TBX, shares,
        tokens, qkvz_TBX.stride(0), qkvz_TBX.stride(1), dqkvz_TBX.stride(0), dqkvz_TBX.stride(1),
        CHANNELS=shape.channels, PACKED=packed,
        BLOCK_T=_WALK_T, BLOCK_C=shape.head_dim, BLOCKS=_BLOCKS_PER_WALK, num_warps=4,
    )  # fmt: skip
    return shares.sum(0)


def delta_gates(
    beta_alpha_TBX: Tensor, a_log_H: Tensor, dt_bias_H: Tensor, beta_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the decay -exp(A)·softplus(α + dt) (fp32) and β's sigmoid, both [B,T,Hv]."""
    tokens, rows, width = beta_alpha_TBX.shape
    heads = width // 2
    decay = beta_alpha_TBX.new_empty(rows, tokens, heads, dtype=torch.float32)
    beta = beta_alpha_TBX.new_empty(rows, tokens, heads, dtype=beta_dtype)
    _gates_kernel[(triton.cdiv(tokens * rows, 64),)](
        beta_alpha_TBX, a_log_H, dt_bias_H, decay, beta, tokens, rows,
        HEADS=heads, BLOCK_H=triton.next_power_of_2(heads), BLOCK_N=64,
    )  # fmt: skip
    return decay, beta


def delta_gates_backward(
    beta_alpha_TBX: Tensor, a_log_H: Tensor, dt_bias_H: Tensor, ddecay: Tensor, dbeta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of β|α [T,B,2·Hv], A_log and dt_bias (fp32)."""
    tokens, rows, width = beta_alpha_TBX.shape
    heads, blocks = width // 2, triton.cdiv(tokens * rows, 64)
    dba = torch.empty_like(beta_alpha_TBX)
    da_log, ddt_bias = (beta_alpha_TBX.new_empty(blocks, heads, dtype=torch.float32) for _ in "at")
    _gates_backward_kernel[(blocks,)](
        beta_alpha_TBX, a_log_H, dt_bias_H, ddecay.contiguous(), dbeta.contiguous(), dba, da_log, ddt_bias,
        tokens, rows, HEADS=heads, BLOCK_H=triton.next_power_of_2(heads), BLOCK_N=64,
    )  # fmt: skip
    return dba, da_log.sum(0), ddt_bias.sum(0)
