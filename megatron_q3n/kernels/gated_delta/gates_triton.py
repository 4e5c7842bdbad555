# mypy: allow-untyped-defs
"""Gates of the gated delta rule in one pass: decay and β from the projection's β|α channels.

    g = -exp(A_log) · softplus(α + dt_bias)        β = sigmoid(b)
    dα = -exp(A_log) · sigmoid(α + dt_bias) · dg        db = dβ · β (1 - β)
    ddt_bias = Σ_t dα        dA_log = Σ_t g · dg

The input is sequence-first [T,B,2·Hv], the outputs are batch-first [B,T,Hv].

Launch geometry: one program per BLOCK_N (token, batch row) pairs with all heads, BLOCK_H ≥ Hv. The gradients of A_log
and dt_bias are one partial sum per program; the partial sums are added in a fixed order.

T tokens, B rows, Hv value heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


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
    partial_index = tl.program_id(0) * HEADS + h
    tl.store(ddt_bias_ptr + partial_index, tl.sum(dz, axis=0), mask=h < HEADS)
    tl.store(da_log_ptr + partial_index, tl.sum(-a[None, :] * softplus * ddecay, axis=0), mask=h < HEADS)


def delta_gates(
    beta_alpha_TBX: Tensor, a_log_H: Tensor, dt_bias_H: Tensor, beta_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the decay -exp(A)·softplus(α + dt) (fp32) and sigmoid(β), both [B,T,Hv]."""
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
