"""The experts of a few tokens, chosen already: two launches that read each chosen weight where it lies.

Composed from torch operations, the chosen weights are copied by index and multiplied as a batch of matrices; what
is read and written for that is read again by the product, and it takes a dozen launches, which for one
token cost more than the work. Without gradients, on one process.

Shapes: T tokens, K experts of each, X width, F and FS hidden sizes of an expert and of the shared expert.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels import registry
from megatron_q3n.kernels.moe.swiglu import weighted_swiglu

OPERATION = "experts of a few tokens"


@dataclass(frozen=True)
class ExpertWeights:
    """All experts' [E,2F,X] and [E,X,F]; the shared expert's [2·FS,X] and [X,FS], and its gate's [1,X], if any."""

    fc1: Tensor
    fc2: Tensor
    shared_fc1: Tensor | None = None
    shared_fc2: Tensor | None = None
    shared_gate: Tensor | None = None


def add_few_experts(
    x_TX: Tensor,
    residual_TX: Tensor,
    experts_TK: Tensor,
    gates_TK: Tensor,
    weights: ExpertWeights,
    fused: bool | None = None,
) -> Tensor:
    """Add what the chosen experts and the shared one make of each token to the residual.

    Shapes: x and residual [T,X]; experts and gates [T,K]. `fused` forces the choice that `choices` makes otherwise.
    Returns: [T,X], maybe in the residual's memory.
    """
    if registry.is_fused(OPERATION, x_TX, fused):
        from megatron_q3n.kernels.decode import experts_triton  # late: Triton

        given = (x_TX, residual_TX, experts_TK, gates_TK)
        x_TX, residual_TX, experts_TK, gates_TK = (tensor.contiguous() for tensor in given)
        return experts_triton.add_few_experts(x_TX, residual_TX, experts_TK, gates_TK, weights)
    routed = _routed(x_TX, experts_TK, gates_TK, weights)
    if weights.shared_fc2 is None:
        return residual_TX + routed
    inner = _inside_shared(x_TX, weights)
    if residual_TX.dtype != inner.dtype:
        return residual_TX + routed + F.linear(inner, weights.shared_fc2)
    return add_product(residual_TX, inner, weights.shared_fc2).add_(routed)


def add_product(sum_: Tensor, x: Tensor, weight_YX: Tensor) -> Tensor:
    """Add x Wᵀ to a sum in the product's own launch. Shapes: sum [...,Y], overwritten and returned; x [...,X]."""
    sum_ = sum_.contiguous()
    sum_.view(-1, sum_.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight_YX.T)
    return sum_


def _routed(x_TX: Tensor, experts_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run each token's experts and add them up in fp32. Returns [T,X]."""
    chosen, (tokens, width) = experts_TK.flatten(), x_TX.shape
    into = weights.fc1.index_select(0, chosen)  # [T·K,2F,X]
    out_of = weights.fc2.index_select(0, chosen)  # [T·K,X,F]
    gate_up = torch.bmm(into.view(tokens, -1, width), x_TX.unsqueeze(-1))
    inner = weighted_swiglu(gate_up.view(len(chosen), -1), gates_TK.flatten())
    parts = torch.bmm(out_of, inner.unsqueeze(-1)).view(tokens, -1, width)
    wide = parts.dtype if parts.dtype == torch.float64 else torch.float32
    return parts.sum(1, dtype=wide).to(parts.dtype)


def _inside_shared(x_TX: Tensor, weights: ExpertWeights) -> Tensor:
    """Run the shared expert up to its last product, its gate on that instead of the output: the same by linearity."""
    assert weights.shared_fc1 is not None
    gate_up = F.linear(x_TX, weights.shared_fc1)
    if weights.shared_gate is None:
        gate_T = gate_up.new_ones(len(x_TX))
    else:
        gate_T = F.linear(x_TX, weights.shared_gate).sigmoid().flatten()
    return weighted_swiglu(gate_up, gate_T)
