"""The router's product: bf16 tokens and weights, fp32 scores, and gradients as good as fp32's on bf16 hardware.

Forward nothing is lost: products of bf16 numbers are exact in fp32, and tensor cores add in fp32. Backward
the fp32 gradient of the scores is split into two bf16 parts, high and low, which together keep 16 bits
of it, where TF32 (what TransformerEngine's fp32 product runs in) keeps 11; the two parts are one
product of twice the depth. So no fp32 copy of the tokens is made, and no slow fp32 product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def router_linear(x: Tensor, weight_EH: Tensor) -> Tensor:
    """Return scores x Wᵀ in fp32.

    Shapes: x [...,H], weight [E,H], of one format.
    """
    if x.dtype != torch.bfloat16:
        return F.linear(x.float(), weight_EH.float())
    return _HighAndLow.apply(x, weight_EH)


class _HighAndLow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_EH: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_EH)
        scores = _product(x.reshape(-1, x.shape[-1]), weight_EH.T)
        return scores.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dscores: Tensor) -> tuple[Tensor, Tensor]:
        x, weight_EH = ctx.saved_tensors
        dscores_TE = dscores.reshape(-1, weight_EH.shape[0]).float()
        high = dscores_TE.bfloat16()
        low = (dscores_TE - high).bfloat16()
        parts = torch.cat([high, low], -1)
        dx = parts @ weight_EH.repeat(2, 1)  # [T,2E] @ [2E,H], added up in fp32
        dweight_2EH = _product(parts.T, x.reshape(-1, x.shape[-1]))
        high_EH, low_EH = dweight_2EH.chunk(2)
        return dx.view(x.shape), (high_EH + low_EH).to(weight_EH.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two bf16 matrices into fp32."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
