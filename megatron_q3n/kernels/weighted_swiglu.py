"""The experts' activation: SiLU(gate) · up, times the router's gate of the row, in fp32 inside."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels import choices

OPERATION = "weighted swiglu"


def weighted_swiglu(gate_up_RF: Tensor, weight_R: Tensor, fused: bool | None = None) -> Tensor:
    """Return SiLU(gate) · up · weight.

    Shapes: gate|up [R,2F], one weight per row [R]; returns [R,F] in gate|up's format.
    `fused` forces the choice that `choices` makes otherwise.
    """
    if choices.is_fused(OPERATION, gate_up_RF, fused):
        return _Fused.apply(gate_up_RF, weight_R)
    gate, up = gate_up_RF.chunk(2, dim=-1)
    return ((F.silu(gate) * up) * weight_R[:, None]).to(gate_up_RF.dtype)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_RF: Tensor, weight_R: Tensor) -> Tensor:
        from megatron_q3n.kernels.fused import weighted_swiglu as fused  # late: Triton

        ctx.save_for_backward(gate_up_RF, weight_R)
        return fused.weighted_swiglu(gate_up_RF.contiguous(), weight_R.contiguous())

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        from megatron_q3n.kernels.fused import weighted_swiglu as fused  # late: Triton

        gate_up, weight = ctx.saved_tensors
        return fused.weighted_swiglu_backward(gate_up.contiguous(), weight.contiguous(), dout)
