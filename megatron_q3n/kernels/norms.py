"""RMSNorm, gated RMSNorm and L2 norm of the architecture, computed in fp32 (fp64 for fp64 inputs)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which the references compute and add up: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply zero-centered RMSNorm over the last dimension: x / rms(x) · (1 + weight).

    The stored weight is the distance from 1, so weight decay pulls the scale to 1, not to 0.
    Returns: x's shape and dtype.
    Reference: Root Mean Square Layer Normalization (arXiv 1910.07467), eq. 4.
    """
    dtype = accumulation_dtype(x)
    return F.rms_norm(x.to(dtype), x.shape[-1:], 1 + weight.to(dtype), eps).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply RMSNorm and a SiLU gate: rms_norm(x) · SiLU(gate), in gate's dtype (the output norm of Gated DeltaNet)."""
    normed = rms_norm(x.to(accumulation_dtype(x)), weight, eps)
    return (normed * F.silu(gate.to(accumulation_dtype(gate)))).to(gate.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale the last dimension to unit length: x / sqrt(Σ x² + eps), in x's dtype (q and k of the delta rule)."""
    x_acc = x.to(accumulation_dtype(x))
    return (x_acc * torch.rsqrt(x_acc.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
