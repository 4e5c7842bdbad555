"""Router GEMM: bf16 tokens and weights, fp32 scores, and gradients of about fp32 precision on bf16 hardware.

Forward nothing is lost: products of bf16 numbers are exact in fp32, and tensor cores accumulate in fp32. Backward, the
fp32 gradient of the scores is split into two bf16 parts, high and low, which together keep 16 of its bits; TF32, in
which TransformerEngine's fp32 GEMM runs, keeps 11. The two parts are one GEMM of twice the inner dimension. So there
is no fp32 copy of the tokens, and no slow fp32 GEMM.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def router_linear(x: Tensor, weight_EH: Tensor) -> Tensor:
    """Return scores x Wᵀ in fp32.

    Shapes: x [...,H], weight [E,H], of one dtype.
    """
    if x.dtype != torch.bfloat16:
        return F.linear(x.float(), weight_EH.float())
    return _SplitGradientLinear.apply(x, weight_EH)


class _SplitGradientLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_EH: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_EH)
        scores = _mm_fp32(x.reshape(-1, x.shape[-1]), weight_EH.T)
        return scores.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dscores: Tensor) -> tuple[Tensor, Tensor]:
        x, weight_EH = ctx.saved_tensors
        dscores_TE = dscores.reshape(-1, weight_EH.shape[0]).float()
        high = dscores_TE.bfloat16()
        low = (dscores_TE - high).bfloat16()
        parts = torch.cat([high, low], -1)
        dx = parts @ weight_EH.repeat(2, 1)  # [T,2E] @ [2E,H], accumulated in fp32
        dweight_2EH = _mm_fp32(parts.T, x.reshape(-1, x.shape[-1]))
        high_EH, low_EH = dweight_2EH.chunk(2)
        return dx.view(x.shape), (high_EH + low_EH).to(weight_EH.dtype)


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two bf16 matrices into fp32."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
