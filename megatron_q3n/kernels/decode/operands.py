"""Operands of the decode kernels: weights and settings, common to the reference and the Triton kernel.

They are separate from the operations so that a reference (`x.py`) and its kernel (`x_triton.py`) import the same types.

Shapes: R rows, X input width, N and M output widths, D head dim, E experts, F and FS hidden sizes of an expert and of
the shared expert.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RMSNormWeights:
    """RMSNorm over a row, scaled by `offset` + weight [X]; an offset of 1 is the zero-centered form."""

    weight_X: Tensor
    eps: float
    offset: float = 1.0


@dataclass(frozen=True)
class GemmInput:
    """Input [R,X] of a decode GEMM, contiguous along X, and the RMSNorm of its prologue (None: used as it is)."""

    x_RX: Tensor
    norm: RMSNormWeights | None = None


@dataclass(frozen=True)
class GemmOutput:
    """Results of a decode GEMM: `out` [R,N], `second_out` [R,M] of the second weight, the normed input [R,X]."""

    out_RN: Tensor
    second_out_RM: Tensor | None = None
    normed_RX: Tensor | None = None


@dataclass(frozen=True)
class AttentionHeads:
    """Head layout of one rank; `window` is the number of tokens that a token attends to, itself included."""

    num_groups: int
    queries_per_group: int
    head_dim: int
    is_gated: bool
    scale: float
    window: int | None = None


@dataclass(frozen=True)
class QKNormWeights:
    """RMSNorm over the D channels of each query and key head, scaled by `offset` + weight (1: zero-centered)."""

    query_D: Tensor
    key_D: Tensor
    eps: float
    offset: float = 1.0


@dataclass(frozen=True)
class RouterConfig:
    """Top-k routing in megatron-core's terms; the bias [E] is added for the selection only, not to the gates."""

    topk: int
    score_function: str = "softmax"
    use_pre_softmax: bool = False
    scaling_factor: float | None = None
    bias_E: Tensor | None = None


@dataclass(frozen=True)
class ExpertWeights:
    """Routed experts [E,2F,X] and [E,X,F]; the shared expert [2·FS,X] and [X,FS] and its gate [1,X], where present."""

    fc1: Tensor
    fc2: Tensor
    shared_fc1: Tensor | None = None
    shared_fc2: Tensor | None = None
    shared_gate: Tensor | None = None
