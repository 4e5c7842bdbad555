# mypy: allow-untyped-defs
"""The shared expert's gate in one pass each way: sigmoid(hidden · w) times the expert's output, row by row, and a sum.

From library calls it is a matrix product with one column, a sigmoid, a broadcast product and an addition, and more
kernels backward, all of them bound by memory.
The weight's gradient is one partial sum per program, added in a fixed order.

T tokens, H width (a program holds whole rows).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 16  # per program


@triton.jit
def _row_gate_kernel(
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
    known = h < WIDTH
    weight = tl.load(weight_ptr + h, mask=known, other=0.0).to(tl.float32)
    for index in range(TOKENS):
        t = (tl.program_id(0) * TOKENS + index).to(tl.int64)
        mask = known & (t < tokens)
        hidden = tl.load(hidden_ptr + t * WIDTH + h, mask=mask, other=0.0).to(tl.float32)
        gate = tl.sigmoid(tl.sum(hidden * weight, axis=0))
        x = tl.load(x_ptr + t * WIDTH + h, mask=mask, other=0.0).to(tl.float32)
        out = x * gate
        if HAS_ADD:
            out += tl.load(add_ptr + t * WIDTH + h, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + t * WIDTH + h, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(gate_ptr + t, gate, mask=t < tokens)


@triton.jit
def _row_gate_backward_kernel(
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
    known = h < WIDTH
    weight = tl.load(weight_ptr + h, mask=known, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_H,), tl.float32)
    for index in range(TOKENS):
        t = (tl.program_id(0) * TOKENS + index).to(tl.int64)
        mask = known & (t < tokens)
        gate = tl.load(gate_ptr + t, mask=t < tokens, other=0.0)
        dout = tl.load(dout_ptr + t * WIDTH + h, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + t * WIDTH + h, mask=mask, other=0.0).to(tl.float32)
        hidden = tl.load(hidden_ptr + t * WIDTH + h, mask=mask, other=0.0).to(tl.float32)
        dlogit = tl.sum(dout * x, axis=0) * gate * (1 - gate)
        element = dx_ptr.dtype.element_ty
        tl.store(dx_ptr + t * WIDTH + h, (dout * gate).to(element), mask=mask)
        tl.store(dhidden_ptr + t * WIDTH + h, (dlogit * weight).to(element), mask=mask)
        dweight += dlogit * hidden
    tl.store(dweight_ptr + tl.program_id(0) * WIDTH + h, dweight, mask=known)


def row_gate(x_TH: Tensor, hidden_TH: Tensor, weight_H: Tensor, add_TH: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return x · sigmoid(hidden · w), plus `add` where given, [T,H], and the gates [T] in fp32."""
    tokens, width = x_TH.shape
    out, gate = torch.empty_like(x_TH), x_TH.new_empty(tokens, dtype=torch.float32)
    _row_gate_kernel[(triton.cdiv(tokens, _TOKENS),)](
        x_TH, hidden_TH, weight_H, add_TH, out, gate, tokens, HAS_ADD=add_TH is not None, **_blocks(width)
    )
    return out, gate


def row_gate_backward(
    x_TH: Tensor, hidden_TH: Tensor, weight_H: Tensor, gate_T: Tensor, dout_TH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, hidden and the weight (fp32)."""
    tokens, width = x_TH.shape
    programs = triton.cdiv(tokens, _TOKENS)
    dx, dhidden = torch.empty_like(x_TH), torch.empty_like(hidden_TH)
    shares = x_TH.new_empty(programs, width, dtype=torch.float32)
    _row_gate_backward_kernel[(programs,)](
        x_TH, hidden_TH, weight_H, gate_T, dout_TH, dx, dhidden, shares, tokens, **_blocks(width)
    )
    return dx, dhidden, shares.sum(0)


def _blocks(width: int) -> dict[str, int]:
    return {"WIDTH": width, "BLOCK_H": triton.next_power_of_2(width), "TOKENS": _TOKENS, "num_warps": 8}
