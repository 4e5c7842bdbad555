# mypy: allow-untyped-defs
"""Shared-expert gate in one pass in each direction: x · sigmoid(hidden · w) + add.

    dlogit = (dout · x) · g · (1 - g)        dx = dout · g        dhidden = dlogit · w        dw = Σ_t dlogit · hidden

From library calls it is a GEMM with one output column, a sigmoid, a broadcast product and an addition, and more kernels
backward, all bound by memory.

Launch geometry: one program per TOKENS tokens, one whole row of BLOCK_H ≥ H columns at a time. The gradient of the
weight is one partial sum per program; the partial sums are added in a fixed order. T tokens, H width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# tokens per program
_TOKENS = 16


@triton.jit
def _gate_kernel(
    x_ptr,
    hidden_ptr,
    weight_ptr,
    add_ptr,
    out_ptr,
    gate_ptr,
    tokens,
    HAS_ADD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TOKENS: tl.constexpr,
):
    h = tl.arange(0, BLOCK_H)
    column_mask = h < WIDTH
    weight = tl.load(weight_ptr + h, mask=column_mask, other=0.0).to(tl.float32)
    for index in range(TOKENS):
        t = (tl.program_id(0) * TOKENS + index).to(tl.int64)
        mask = column_mask & (t < tokens)
        hidden = tl.load(hidden_ptr + t * WIDTH + h, mask=mask, other=0.0).to(tl.float32)
        gate = tl.sigmoid(tl.sum(hidden * weight, axis=0))
        x = tl.load(x_ptr + t * WIDTH + h, mask=mask, other=0.0).to(tl.float32)
        out = x * gate
        if HAS_ADD:
            out += tl.load(add_ptr + t * WIDTH + h, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + t * WIDTH + h, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(gate_ptr + t, gate, mask=t < tokens)


@triton.jit
def _gate_backward_kernel(
    x_ptr,
    hidden_ptr,
    weight_ptr,
    gate_ptr,
    dout_ptr,
    dx_ptr,
    dhidden_ptr,
    dweight_ptr,
    tokens,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TOKENS: tl.constexpr,
):
    h = tl.arange(0, BLOCK_H)
    column_mask = h < WIDTH
    weight = tl.load(weight_ptr + h, mask=column_mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_H,), tl.float32)
    for index in range(TOKENS):
        t = (tl.program_id(0) * TOKENS + index).to(tl.int64)
        mask = column_mask & (t < tokens)
        gate = tl.load(gate_ptr + t, mask=t < tokens, other=0.0)
        dout = tl.load(dout_ptr + t * WIDTH + h, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + t * WIDTH + h, mask=mask, other=0.0).to(tl.float32)
        hidden = tl.load(hidden_ptr + t * WIDTH + h, mask=mask, other=0.0).to(tl.float32)
        dlogit = tl.sum(dout * x, axis=0) * gate * (1 - gate)
        dtype = dx_ptr.dtype.element_ty
        tl.store(dx_ptr + t * WIDTH + h, (dout * gate).to(dtype), mask=mask)
        tl.store(dhidden_ptr + t * WIDTH + h, (dlogit * weight).to(dtype), mask=mask)
        dweight += dlogit * hidden
    tl.store(dweight_ptr + tl.program_id(0) * WIDTH + h, dweight, mask=column_mask)


def shared_expert_gate(
    x_TH: Tensor, hidden_TH: Tensor, weight_H: Tensor, add_TH: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return x · sigmoid(hidden · w), plus `add` where it is not None, [T,H], and the gates [T] in fp32."""
    tokens, width = x_TH.shape
    out, gate = torch.empty_like(x_TH), x_TH.new_empty(tokens, dtype=torch.float32)
    _gate_kernel[(triton.cdiv(tokens, _TOKENS),)](
        x_TH, hidden_TH, weight_H, add_TH, out, gate, tokens, HAS_ADD=add_TH is not None, **_blocks(width)
    )
    return out, gate


def shared_expert_gate_backward(
    x_TH: Tensor, hidden_TH: Tensor, weight_H: Tensor, gate_T: Tensor, dout_TH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, hidden and the weight (fp32)."""
    tokens, width = x_TH.shape
    num_programs = triton.cdiv(tokens, _TOKENS)
    dx, dhidden = torch.empty_like(x_TH), torch.empty_like(hidden_TH)
    partial_dweight = x_TH.new_empty(num_programs, width, dtype=torch.float32)
    _gate_backward_kernel[(num_programs,)](
        x_TH, hidden_TH, weight_H, gate_T, dout_TH, dx, dhidden, partial_dweight, tokens, **_blocks(width)
    )
    return dx, dhidden, partial_dweight.sum(0)


def _blocks(width: int) -> dict[str, int]:
    return {"WIDTH": width, "BLOCK_H": triton.next_power_of_2(width), "TOKENS": _TOKENS, "num_warps": 8}
