"""RMSNorm of the residual stream for several consumers, with one backward kernel for all their gradients.

Each consumer gets its own alias of the normed tokens, so that autograd delivers their gradients separately and the
fused backward pass accumulates them, together with the gradient of the residual stream. In the reference all aliases
are one tensor and autograd accumulates.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_q3n.kernels.norms import rms_norm


def residual_norm(
    x: Tensor, weight_H: Tensor, eps: float, num_consumers: int = 1, fused: bool = False
) -> tuple[Tensor, ...]:
    """Apply RMSNorm (kernels/norms.py) to the residual stream for 1 to 4 consumers.

    Shapes: x [...,H], weight [H]. `fused` runs the Triton kernel instead of the reference.
    Returns: the residual stream, and one alias of the normed tokens per consumer.
    """
    if not fused:
        return x, *[rms_norm(x, weight_H, eps)] * num_consumers
    if torch.is_grad_enabled() and x.requires_grad:
        return _FusedResidualNorm.apply(x, weight_H, eps, num_consumers)
    # the residual stream has no gradient, so it needs no alias
    _, *normed = _FusedResidualNorm.apply(x, weight_H, eps, num_consumers)
    return x, *normed


class _FusedResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float, num_consumers: int) -> Any:
        from megatron_q3n.kernels import residual_norm_triton as kernel  # late: Triton

        x = x.contiguous()
        ctx.save_for_backward(x, weight_H)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        normed = kernel.residual_norm(x.view(-1, x.shape[-1]), weight_H, eps).view(x.shape)
        return x.detach(), *(normed.detach() for _ in range(num_consumers))

    @staticmethod
    def backward(ctx: Any, dresidual: Tensor | None, *dnormed: Tensor | None) -> Any:
        from megatron_q3n.kernels import residual_norm_triton as kernel  # late: Triton

        x, weight_H = ctx.saved_tensors
        flatten = lambda gradient: gradient.contiguous().view(-1, x.shape[-1])
        present = [flatten(gradient) for gradient in dnormed if gradient is not None]
        if not present:
            return dresidual, None, None, None
        dresidual_TH = None if dresidual is None else flatten(dresidual)
        dx, dweight = kernel.residual_norm_backward(flatten(x), weight_H, ctx.eps, dresidual_TH, present)
        return dx.view(x.shape), dweight.to(weight_H.dtype), None, None
