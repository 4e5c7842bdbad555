"""Shared-expert gate: the shared expert's output times sigmoid(hidden · w), one gate per token, plus a residual."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def shared_expert_gate(
    x: Tensor, hidden: Tensor, weight_1H: Tensor, add: Tensor | None = None, fused: bool = False
) -> Tensor:
    """Return x · sigmoid(hidden wᵀ), plus `add` where it is not None.

    Shapes: x, hidden, add [...,H], weight [1,H]. `fused` runs the Triton kernel instead of the reference.
    """
    if fused:
        width = x.shape[-1]
        add_TH = None if add is None else add.reshape(-1, width)
        return _FusedGate.apply(x.reshape(-1, width), hidden.reshape(-1, width), weight_1H, add_TH).view(x.shape)
    gated = x * F.linear(hidden, weight_1H).sigmoid()
    return gated if add is None else gated + add


class _FusedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, hidden_TH: Tensor, weight_1H: Tensor, add_TH: Tensor | None) -> Tensor:
        from megatron_q3n.kernels.moe import shared_expert_gate_triton as kernel  # late: Triton

        x_TH, hidden_TH = x_TH.contiguous(), hidden_TH.contiguous()
        add_TH = None if add_TH is None else add_TH.contiguous()
        out, gate = kernel.shared_expert_gate(x_TH, hidden_TH, weight_1H, add_TH)
        ctx.save_for_backward(x_TH, hidden_TH, weight_1H, gate)
        return out

    @staticmethod
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        from megatron_q3n.kernels.moe import shared_expert_gate_triton as kernel  # late: Triton

        x, hidden, weight, gate = ctx.saved_tensors
        dx, dhidden, dweight = kernel.shared_expert_gate_backward(x, hidden, weight, gate, dout_TH.contiguous())
        dadd = dout_TH if ctx.needs_input_grad[3] else None
        return dx, dhidden, dweight.to(weight.dtype).view_as(weight), dadd
