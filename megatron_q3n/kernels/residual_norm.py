"""The norm at a layer's head: from the residual stream to several readers, and the stream itself going on.

Each reader gets a name of its own for the same normed tokens, so that their gradients arrive one by one and a fused
backward pass adds them up with the stream's. Unfused all names are one tensor, and adding is autograd's.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_q3n.kernels import registry
from megatron_q3n.kernels.norms import rms_norm

OPERATION = "norm and residual"


def residual_norm(
    x: Tensor, weight_H: Tensor, eps: float, readers: int = 1, fused: bool | None = None
) -> tuple[Tensor, ...]:
    """Norm the stream (kernels/norms.py) for `readers`, 1 to 4.

    Shapes: x [...,H], weight [H]. `fused` forces the choice that `choices` makes otherwise.
    Returns: the stream as it goes on, and the normed tokens once for each reader.
    """
    if not registry.is_fused(OPERATION, x, fused):
        return x, *[rms_norm(x, weight_H, eps)] * readers
    if torch.is_grad_enabled() and x.requires_grad:
        return _Fused.apply(x, weight_H, eps, readers)
    # nobody wants the stream's gradient
    _, *normed = _Fused.apply(x, weight_H, eps, readers)
    return x, *normed


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float, readers: int) -> Any:
        from megatron_q3n.kernels import residual_norm_triton as fused  # late: Triton

        x = x.contiguous()
        ctx.save_for_backward(x, weight_H)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        normed = fused.residual_norm(x.view(-1, x.shape[-1]), weight_H, eps).view(x.shape)
        return x.detach(), *(normed.detach() for _ in range(readers))

    @staticmethod
    def backward(ctx: Any, dstream: Tensor | None, *dnormed: Tensor | None) -> Any:
        from megatron_q3n.kernels import residual_norm_triton as fused  # late: Triton

        x, weight_H = ctx.saved_tensors
        flat = lambda gradient: gradient.contiguous().view(-1, x.shape[-1])
        given = [flat(gradient) for gradient in dnormed if gradient is not None]
        if not given:
            return dstream, None, None, None
        stream = None if dstream is None else flat(dstream)
        dx, dweight = fused.residual_norm_backward(flat(x), weight_H, ctx.eps, stream, given)
        return dx.view(x.shape), dweight.to(weight_H.dtype), None, None
