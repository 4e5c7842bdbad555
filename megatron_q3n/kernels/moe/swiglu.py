"""SwiGLU activation of the experts: SiLU(gate) · up, times the row's router gate if there is one, in fp32 inside."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up_RF: Tensor, weight_R: Tensor | None, fused: bool = False) -> Tensor:
    """Return SiLU(gate) · up · weight.

    Shapes: gate|up [R,2F], one weight per row [R] or None. `fused` runs the Triton kernel instead of the reference.
    Returns: [R,F] in the dtype of gate|up.
    Reference: GLU Variants Improve Transformer (arXiv 2002.05202), eq. 6.
    """
    if fused:
        return _FusedSwiGLU.apply(gate_up_RF, weight_R)
    gate, up = gate_up_RF.chunk(2, dim=-1)
    activated = F.silu(gate) * up
    return activated if weight_R is None else (activated * weight_R[:, None]).to(gate_up_RF.dtype)


class _FusedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_RF: Tensor, weight_R: Tensor | None) -> Tensor:
        from megatron_q3n.kernels.moe import swiglu_triton as kernel  # late: Triton

        ctx.save_for_backward(gate_up_RF, weight_R)
        weight = None if weight_R is None else weight_R.contiguous()
        return kernel.swiglu(gate_up_RF.contiguous(), weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor | None]:
        from megatron_q3n.kernels.moe import swiglu_triton as kernel  # late: Triton

        gate_up, weight = ctx.saved_tensors
        weight = None if weight is None else weight.contiguous()
        return kernel.swiglu_backward(gate_up.contiguous(), weight, dout)
