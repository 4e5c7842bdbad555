"""Rotary position embedding (RoPE) in plain torch: the one place where it is applied.

Reference: RoFormer (arXiv 2104.09864), eq. 34, on the first W channels of a head (partial RoPE), which are paired as
in GPT-NeoX: channel i with channel i + W/2; or, if interleaved, channel 2i with channel 2i + 1.

Shapes: T tokens, B rows, H heads, D head dim, W rotated channels.
"""

import torch
from torch import Tensor


def apply_rope(x_TBHD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first W channels of each head; the others carry no position.

    Shapes: cos and sin broadcast to [T,B,H,W]. The product is computed in the wider dtype of x and cos, and rounded to
        the dtype of x.
    Returns: [T,B,H,D].
    """
    rotated, rest = x_TBHD[..., : cos.shape[-1]], x_TBHD[..., cos.shape[-1] :]
    rotated = rotated * cos + rotate_half(rotated, interleaved) * sin
    return torch.cat([rotated.to(x_TBHD.dtype), rest], -1)


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Return each pair (a, b) of the last dimension as (-b, a), in place of the pair."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
