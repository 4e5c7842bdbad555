"""Decode experts: the routed experts of a few tokens and the shared expert, added to the residual, in two launches.

    out = residual + Σ_k gate_k · fc2_k(swiglu(fc1_k(x))) + sigmoid(x·w) · shared_fc2(swiglu(shared_fc1(x)))

The fused kernels read the selected experts' weights in place. From torch operations, those weights are gathered by
index and multiplied as a batch of matrices: they are written and read once more, and a dozen launches cost more than
the work of one token. Without gradients, on one process.

Shapes: T tokens, K experts per token, X width, F and FS hidden sizes of an expert and of the shared expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels.decode.operands import ExpertWeights
from megatron_q3n.kernels.moe.swiglu import swiglu
from megatron_q3n.kernels.norms import accumulation_dtype


def decode_experts(
    x_TX: Tensor, residual_TX: Tensor, experts_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, fused: bool = False
) -> Tensor:
    """Add the output of the routed experts and of the shared expert to the residual (residual epilogue).

    Shapes: x and residual [T,X]; experts and gates [T,K]. `fused` runs the Triton kernel instead of the reference.
    Returns: [T,X], which may share the residual's memory.
    """
    if fused:
        from megatron_q3n.kernels.decode import experts_triton as kernel  # late: Triton

        x, residual, experts, gates = (tensor.contiguous() for tensor in (x_TX, residual_TX, experts_TK, gates_TK))
        return kernel.decode_experts(x, residual, experts, gates, weights)
    routed = _run_routed(x_TX, experts_TK, gates_TK, weights)
    if weights.shared_fc2 is None:
        return residual_TX + routed
    hidden = _shared_hidden(x_TX, weights)
    if residual_TX.dtype != hidden.dtype:
        return residual_TX + routed + F.linear(hidden, weights.shared_fc2)
    return add_product(residual_TX, hidden, weights.shared_fc2).add_(routed)


def add_product(sum_: Tensor, x: Tensor, weight_YX: Tensor) -> Tensor:
    """Add x Wᵀ to a sum in one launch (addmm). Shapes: sum [...,Y], overwritten and returned; x [...,X]."""
    sum_ = sum_.contiguous()
    sum_.view(-1, sum_.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight_YX.T)
    return sum_


def _run_routed(x_TX: Tensor, experts_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """Run each token's experts and add them up in fp32. Returns [T,X]."""
    selected, (tokens, width) = experts_TK.flatten(), x_TX.shape
    fc1 = weights.fc1.index_select(0, selected)  # [T·K,2F,X]
    fc2 = weights.fc2.index_select(0, selected)  # [T·K,X,F]
    gate_up = torch.bmm(fc1.view(tokens, -1, width), x_TX.unsqueeze(-1))
    hidden = swiglu(gate_up.view(len(selected), -1), gates_TK.flatten())
    outputs = torch.bmm(fc2, hidden.unsqueeze(-1)).view(tokens, -1, width)
    return outputs.sum(1, dtype=accumulation_dtype(outputs)).to(outputs.dtype)


def _shared_hidden(x_TX: Tensor, weights: ExpertWeights) -> Tensor:
    """Run the shared expert up to fc2, with its gate on the hidden values: equal to gating the output, by linearity."""
    assert weights.shared_fc1 is not None
    gate_up = F.linear(x_TX, weights.shared_fc1)
    if weights.shared_gate is None:
        gate_T = gate_up.new_ones(len(x_TX))
    else:
        gate_T = F.linear(x_TX, weights.shared_gate).sigmoid().flatten()
    return swiglu(gate_up, gate_T)
