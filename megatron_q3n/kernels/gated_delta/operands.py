"""Operands of the Gated DeltaNet kernels: weights and head layouts, common to the references and the Triton kernels.

Shapes: C = q|k|v channels, Hk/Hv key/value heads, V head dim of the values.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class DeltaWeights:
    """Weights of the mixer: conv1d [C,kernel size], A_log and dt_bias [Hv] (fp32), output norm [V] (fp32)."""

    conv_weight_CK: Tensor
    a_log_H: Tensor
    dt_bias_H: Tensor
    norm_V: Tensor


class DeltaHeadConfig(Protocol):
    """Sizes of a Gated DeltaNet under megatron-core's names: TransformerConfig and ModelConfig both have them."""

    @property
    def linear_num_key_heads(self) -> int:
        """Key heads of the whole model."""

    @property
    def linear_num_value_heads(self) -> int:
        """Value heads of the whole model."""

    @property
    def linear_key_head_dim(self) -> int:
        """Size of a key head."""

    @property
    def linear_value_head_dim(self) -> int:
        """Size of a value head."""

    @property
    def layernorm_epsilon(self) -> float:
        """Epsilon of the output norm."""


@dataclass(frozen=True)
class DeltaHeads:
    """Head counts of this rank, head dims, and the epsilon of the output norm."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    eps: float

    @classmethod
    def of(cls, config: DeltaHeadConfig, num_shares: int) -> "DeltaHeads":
        """Return one of `num_shares` equal shares of a model's heads: those of a rank."""
        return cls(
            config.linear_num_key_heads // num_shares,
            config.linear_num_value_heads // num_shares,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
            config.layernorm_epsilon,
        )

    @property
    def sections(self) -> list[int]:
        """Widths of q, k, v, z."""
        key, value = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        return [key, key, value, value]


@dataclass(frozen=True)
class DeltaShape:
    """Head layout: query and key have `key_heads`, value has `value_heads`, all of `head_dim`."""

    key_heads: int
    value_heads: int
    head_dim: int

    @property
    def heads(self) -> int:
        """Heads of q, k and v together."""
        return 2 * self.key_heads + self.value_heads

    @property
    def channels(self) -> int:
        """Channels of q|k|v."""
        return self.heads * self.head_dim
