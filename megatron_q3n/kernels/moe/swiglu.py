"""The experts' activation: SiLU(gate) · up, times the router's gate of the row if it has one, in fp32 inside."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels import registry

OPERATION = "weighted swiglu"


def weighted_swiglu(gate_up_RF: Tensor, weight_R: Tensor | None, fused: bool | None = None) -> Tensor:
    """Return SiLU(gate) · up · weight.

    Shapes: gate|up [R,2F], one weight per row [R] or None; returns [R,F] in gate|up's format.
    `fused` forces the choice that `choices` makes otherwise.
    """
    if registry.is_fused(OPERATION, gate_up_RF, fused):
        return _Fused.apply(gate_up_RF, weight_R)
    gate, up = gate_up_RF.chunk(2, dim=-1)
    made = F.silu(gate) * up
    return made if weight_R is None else (made * weight_R[:, None]).to(gate_up_RF.dtype)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_RF: Tensor, weight_R: Tensor | None) -> Tensor:
        from megatron_q3n.kernels.moe import swiglu_triton as fused  # late: Triton

        ctx.save_for_backward(gate_up_RF, weight_R)
        weight = None if weight_R is None else weight_R.contiguous()
        return fused.weighted_swiglu(gate_up_RF.contiguous(), weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor | None]:
        from megatron_q3n.kernels.moe import swiglu_triton as fused  # late: Triton

        gate_up, weight = ctx.saved_tensors
        weight = None if weight is None else weight.contiguous()
        return fused.weighted_swiglu_backward(gate_up.contiguous(), weight, dout)
