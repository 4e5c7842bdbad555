"""The shared expert's gate: its output times sigmoid(hidden · w), one number per token, on top of what it adds to."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels import registry

OPERATION = "shared expert gate"


def row_gate(
    x: Tensor, hidden: Tensor, weight_1H: Tensor, add: Tensor | None = None, fused: bool | None = None
) -> Tensor:
    """Return x · sigmoid(hidden wᵀ), plus `add` where given.

    Shapes: x, hidden, add [...,H], weight [1,H]. `fused` forces the choice that `choices` makes otherwise.
    """
    if registry.is_fused(OPERATION, x, fused):
        width = x.shape[-1]
        flat = x.reshape(-1, width), hidden.reshape(-1, width)
        added = None if add is None else add.reshape(-1, width)
        return _Fused.apply(*flat, weight_1H, added).view(x.shape)
    gated = x * F.linear(hidden, weight_1H).sigmoid()
    return gated if add is None else gated + add


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, hidden_TH: Tensor, weight_1H: Tensor, add_TH: Tensor | None) -> Tensor:
        from megatron_q3n.kernels.moe import shared_expert_gate_triton as fused  # late: Triton

        x_TH, hidden_TH = x_TH.contiguous(), hidden_TH.contiguous()
        added = None if add_TH is None else add_TH.contiguous()
        out, gate = fused.row_gate(x_TH, hidden_TH, weight_1H, added)
        ctx.save_for_backward(x_TH, hidden_TH, weight_1H, gate)
        return out

    @staticmethod
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        from megatron_q3n.kernels.moe import shared_expert_gate_triton as fused  # late: Triton

        x, hidden, weight, gate = ctx.saved_tensors
        dx, dhidden, dweight = fused.row_gate_backward(x, hidden, weight, gate, dout_TH.contiguous())
        dadd = dout_TH if ctx.needs_input_grad[3] else None
        return dx, dhidden, dweight.to(weight.dtype).view_as(weight), dadd
