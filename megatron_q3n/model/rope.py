"""Rotary positions of a forward pass: cosines and sines at explicit positions, for decoding and MTP training.

Everything here follows megatron-core's RotaryEmbedding (its frequencies and its pairing of channels) and applies the
rotation with kernels/attention/rope.py. The trunk in training has consecutive positions and uses megatron-core's
angles, in its own attention or in kernels/attention/qkv_norm_rope.py. model/reference has a version of its own, so
that it stays an independent oracle.

Reference: RoFormer (arXiv 2104.09864), eq. 34; partial RoPE rotates only the first W channels of a head.

Shapes: T tokens, N sequences, H heads, D head dim, W rotated channels, L positions of a table, S all tokens of a pass.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_q3n.kernels.attention.rope import apply_rope


class TokenPositions(Protocol):
    """Positions of the tokens of a pass, flat, and their arrangement in the layers' order (model/decode/span.py)."""

    @property
    def position_S(self) -> Tensor:
        """Position of every token [S], int64."""

    def arrange(self, flat_S: Tensor) -> Tensor:
        """Return a flat tensor [S,…] in the layers' order [T,N,…]."""


@dataclass(frozen=True)
class RopeAngles:
    """Cosine and sine at the positions of one pass, shared by its layers; differentiable, any pairing of channels.

    Shapes: cos and sin [T,N,1,W].
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    @classmethod
    def at(cls, positions_TN: Tensor, embedding: RotaryEmbedding, dtype: torch.dtype) -> "RopeAngles":
        """Compute the rotation at these positions from megatron-core's frequencies, in `dtype`."""
        frequencies = embedding.inv_freq.to(positions_TN.device)
        half = positions_TN.to(frequencies.dtype)[..., None, None] * frequencies
        interleaved = embedding.rotary_interleaved
        angles = half.repeat_interleave(2, -1) if interleaved else torch.cat([half, half], -1)
        return cls(angles.cos().to(dtype), angles.sin().to(dtype), interleaved)

    def apply(self, x_TNHD: Tensor) -> Tensor:
        """Rotate the first W channels of each head. Returns: a new tensor [T,N,H,D]."""
        return apply_rope(x_TNHD, self.cos, self.sin, self.interleaved)


@dataclass(frozen=True)
class RopeTable:
    """Rotations of one pass as rows of a table of all positions; in place, without gradients, not interleaved.

    One kernel launch reads the rows of a pass, three rotate a layer's queries and keys.

    Shapes: table [L,2·W]: the cosine, then the sine with the sign that each half of the channels takes.
    """

    table_LW: Tensor
    positions: TokenPositions

    @staticmethod
    def build(num_positions: int, embedding: RotaryEmbedding, dtype: torch.dtype) -> Tensor:
        """Compute the table of positions 0 to `num_positions` - 1. Returns: [L,2·W]."""
        device = torch.cuda.current_device()
        angles = RopeAngles.at(torch.arange(num_positions, device=device)[:, None], embedding, dtype)
        first, second = angles.sin.chunk(2, -1)
        return torch.cat([angles.cos, -first, second], -1).flatten(1)

    @cached_property
    def rows(self) -> Tensor:
        """The rows of the pass's positions [T,N,1,2·W]."""
        rows_SW = self.table_LW.index_select(0, self.positions.position_S)
        return self.positions.arrange(rows_SW)[:, :, None]

    def apply(self, x_TNHD: Tensor) -> Tensor:
        """Rotate the first W channels of each head in place. Returns: the same tensor."""
        cos, signed_sin = self.rows.chunk(2, -1)
        rotated = x_TNHD[..., : cos.shape[-1]]
        halves_swapped = rotated.roll(cos.shape[-1] // 2, -1)
        rotated.mul_(cos).addcmul_(halves_swapped, signed_sin)
        return x_TNHD
