"""The three normalisations of the architecture, in fp32 inside (fp64 for double inputs) whatever the input's format."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zero-centered RMSNorm over the last dimension: x / rms(x) · (1 + weight).

    The stored weight is the distance from 1, so weight decay pulls the scale to 1, not to 0.
    Returns: x's shape and dtype.
    """
    wide = _wide(x)
    return F.rms_norm(wide, wide.shape[-1:], 1 + weight.to(wide.dtype), eps).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise and gate: rms_norm(x) · SiLU(gate), in gate's dtype (Gated DeltaNet's output)."""
    return (rms_norm(_wide(x), weight, eps) * F.silu(_wide(gate))).to(gate.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale the last dimension to unit length: x / sqrt(Σ x² + eps), in x's dtype (the delta rule's q and k)."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
