# mypy: allow-untyped-defs
"""SiLU(gate) · up · router gate for sorted rows, in one pass each way; the sum for the router gate's gradient included.

Without router gates it is the shared expert's activation.

R rows, F expert width (one program holds whole rows).
"""

import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096  # per program


@triton.jit
def _weighted_swiglu_kernel(
    gate_up_ptr,
    weight_ptr,
    out_ptr,
    rows,
    WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    mask = (r < rows)[:, None] & (f < WIDTH)[None, :]
    place = r[:, None] * (2 * WIDTH) + f[None, :]
    gate = tl.load(gate_up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + place + WIDTH, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        y *= tl.load(weight_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + r[:, None] * WIDTH + f[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weighted_swiglu_backward_kernel(
    gate_up_ptr,
    weight_ptr,
    dout_ptr,
    dgate_up_ptr,
    dweight_ptr,
    rows,
    WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    mask = (r < rows)[:, None] & (f < WIDTH)[None, :]
    place = r[:, None] * (2 * WIDTH) + f[None, :]
    gate = tl.load(gate_up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + place + WIDTH, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dout_ptr + r[:, None] * WIDTH + f[None, :], mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    if WEIGHTED:
        tl.store(dweight_ptr + r, tl.sum(d * silu * up, axis=1), mask=r < rows)
        d *= tl.load(weight_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    element = dgate_up_ptr.dtype.element_ty
    tl.store(dgate_up_ptr + place, (d * up * sigmoid * (1 + gate - silu)).to(element), mask=mask)
    tl.store(dgate_up_ptr + place + WIDTH, (d * silu).to(element), mask=mask)


def weighted_swiglu(gate_up_RF: Tensor, weight_R: Tensor | None) -> Tensor:
    """Return SiLU(gate) · up · weight, [R,F], for gate|up [R,2F] and one weight per row, if there are weights."""
    rows, width = gate_up_RF.shape[0], gate_up_RF.shape[1] // 2
    out = gate_up_RF.new_empty(rows, width)
    _weighted_swiglu_kernel[_grid(rows, width)](
        gate_up_RF, weight_R, out, rows, WEIGHTED=weight_R is not None, **_blocks(width)
    )
    return out


def weighted_swiglu_backward(
    gate_up_RF: Tensor, weight_R: Tensor | None, dout_RF: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of gate|up [R,2F] and of the weights [R]."""
    rows, width = gate_up_RF.shape[0], gate_up_RF.shape[1] // 2
    dgate_up = gate_up_RF.new_empty(gate_up_RF.shape)
    dweight = None if weight_R is None else weight_R.new_empty(rows)
    _weighted_swiglu_backward_kernel[_grid(rows, width)](
        gate_up_RF,
        weight_R,
        dout_RF.contiguous(),
        dgate_up,
        dweight,
        rows,
        WEIGHTED=weight_R is not None,
        **_blocks(width),
    )
    return dgate_up, dweight


def _blocks(width: int) -> dict[str, int]:
    block_f = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK_F": block_f, "BLOCK_R": max(1, _ELEMENTS // block_f)}


def _grid(rows: int, width: int) -> tuple[int]:
    return (triton.cdiv(rows, _blocks(width)["BLOCK_R"]),)
