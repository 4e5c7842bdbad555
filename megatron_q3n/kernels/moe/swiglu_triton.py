# mypy: allow-untyped-defs
"""SwiGLU with router gates for permuted token rows, in one pass in each direction.

    y = SiLU(gate) · up · w        SiLU'(x) = σ(x) (1 + x (1 - σ(x)))                    (arXiv 2002.05202, eq. 6)
    dw = Σ_f dy · SiLU(gate) · up

The row sum for the router gate's gradient dw is part of the backward pass. Without router gates it is the shared
expert's activation.

Launch geometry: one program per BLOCK_R rows × BLOCK_F ≥ F columns (whole rows). R rows, F expert width.
"""

import triton
import triton.language as tl
from torch import Tensor

# elements per program
_ELEMENTS = 4096


@triton.jit
def _swiglu_kernel(
    gate_up_ptr,
    weight_ptr,
    out_ptr,
    rows,
    HAS_WEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    mask = (r < rows)[:, None] & (f < WIDTH)[None, :]
    offset = r[:, None] * (2 * WIDTH) + f[None, :]
    gate = tl.load(gate_up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + offset + WIDTH, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + r[:, None] * WIDTH + f[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    gate_up_ptr,
    weight_ptr,
    dout_ptr,
    dgate_up_ptr,
    dweight_ptr,
    rows,
    HAS_WEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    mask = (r < rows)[:, None] & (f < WIDTH)[None, :]
    offset = r[:, None] * (2 * WIDTH) + f[None, :]
    gate = tl.load(gate_up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + offset + WIDTH, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dout_ptr + r[:, None] * WIDTH + f[None, :], mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    if HAS_WEIGHT:
        tl.store(dweight_ptr + r, tl.sum(d * silu * up, axis=1), mask=r < rows)
        d *= tl.load(weight_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    dtype = dgate_up_ptr.dtype.element_ty
    tl.store(dgate_up_ptr + offset, (d * up * sigmoid * (1 + gate - silu)).to(dtype), mask=mask)
    tl.store(dgate_up_ptr + offset + WIDTH, (d * silu).to(dtype), mask=mask)


def swiglu(gate_up_RF: Tensor, weight_R: Tensor | None) -> Tensor:
    """Return SiLU(gate) · up · weight, [R,F], for gate|up [R,2F] and one weight per row (None: no weights)."""
    rows, width = gate_up_RF.shape[0], gate_up_RF.shape[1] // 2
    out = gate_up_RF.new_empty(rows, width)
    _swiglu_kernel[_grid(rows, width)](
        gate_up_RF, weight_R, out, rows, HAS_WEIGHT=weight_R is not None, **_blocks(width)
    )
    return out


def swiglu_backward(gate_up_RF: Tensor, weight_R: Tensor | None, dout_RF: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of gate|up [R,2F] and of the weights [R]."""
    rows, width = gate_up_RF.shape[0], gate_up_RF.shape[1] // 2
    dgate_up = gate_up_RF.new_empty(gate_up_RF.shape)
    dweight = None if weight_R is None else weight_R.new_empty(rows)
    _swiglu_backward_kernel[_grid(rows, width)](
        gate_up_RF,
        weight_R,
        dout_RF.contiguous(),
        dgate_up,
        dweight,
        rows,
        HAS_WEIGHT=weight_R is not None,
        **_blocks(width),
    )
    return dgate_up, dweight


def _blocks(width: int) -> dict[str, int]:
    block_f = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK_F": block_f, "BLOCK_R": max(1, _ELEMENTS // block_f)}


def _grid(rows: int, width: int) -> tuple[int]:
    return (triton.cdiv(rows, _blocks(width)["BLOCK_R"]),)
