"""The experts of a few tokens: no sorting, no counts, nothing that waits for the GPU.

What serves thousands of tokens (dispatch.py: plan rows, copy tokens to them, one grouped product over
all experts, copy back) costs a token of decoding mostly launches, and megatron-core's layers around it
more Python than a GPU needs for the work. Here the chosen experts' weights are copied by index and
multiplied as a batch of matrices, token by token the same sums. The copy is why it is for few tokens:
it reads and writes what the product then reads again.

Only without gradients, where one process holds all experts and dense weights whole.

Shapes: T tokens, K experts of each, F an expert's hidden size, X hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch import Tensor

from megatron_q3n.kernels import choices, grouped_linear, permutation
from megatron_q3n.kernels.weighted_swiglu import weighted_swiglu
from megatron_q3n.model.dispatch import LocalDispatcher
from megatron_q3n.model.route_tape import RouteTape

MOST_TOKENS = 16
MOST_COPIED_BYTES = (
    64 * 2**20
)  # copied in some 45 µs on an H200; sorting and its launches cost more


def serves(moe: Any, num_tokens: int) -> bool:
    """Whether `add_few_experts` computes what the layer would, for so many tokens, and as fast."""
    if num_tokens > MOST_TOKENS or torch.is_grad_enabled() or not _is_whole(moe):
        return False
    experts = moe.experts
    weights = experts.linear_fc1.weight, experts.linear_fc2.weight
    each = sum(weight[0].numel() * weight.element_size() for weight in weights)
    return num_tokens * moe.router.topk * each <= MOST_COPIED_BYTES and _chooses_alone(moe.router)


def wait_for_nobody(moe: Any, num_tokens: int) -> bool:
    """Whether a layer's experts run so many tokens without asking the host, one way or the other."""
    if serves(moe, num_tokens):
        return True
    fused = choices.lacking((permutation.OPERATION, grouped_linear.OPERATION)) == []
    in_bf16 = moe.config.params_dtype == torch.bfloat16
    return _is_whole(moe) and _chooses_alone(moe.router) and fused and in_bf16


def _is_whole(moe: Any) -> bool:
    return isinstance(moe.token_dispatcher, LocalDispatcher) and moe.tp_group.size() == 1


def _chooses_alone(router: Any) -> bool:
    """Whether the choice is plain top-k: nobody listens, replays, draws or balances."""
    tape: RouteTape | None = router.tape
    is_idle = tape is None or not (tape.is_recording or tape.given_TK is not None)
    config = router.config
    changes_scores = config.moe_router_force_biased is not None or config.moe_input_jitter_eps
    balances = router.routing_type in ("sinkhorn", "quantile_balancing")
    return is_idle and not (router.forces_balance or changes_scores or balances)


def add_few_experts(moe: Any, hidden: Tensor, residual: Tensor) -> Tensor:
    """Add what the MoE layer returns for a few tokens to the residual, where that lies if formats agree.

    Shapes: hidden, residual [...,X]; returns the same.
    """
    tokens_TX = hidden.flatten(0, -2)
    gates_TK, experts_TK = _choose(moe.router, hidden)
    routed = _routed(moe.experts, tokens_TX, gates_TK, experts_TK).view(hidden.shape)
    if moe.shared_experts is None:
        return residual + routed
    inner = _inside_shared(moe.shared_experts, tokens_TX).view(*hidden.shape[:-1], -1)
    weight = moe.shared_experts.linear_fc2.weight
    if residual.dtype != inner.dtype:
        return residual + routed + F.linear(inner, weight)
    return add_product(residual, inner, weight).add_(routed)


def add_product(sum_: Tensor, x: Tensor, weight_YX: Tensor) -> Tensor:
    """Add x Wᵀ to a sum in the product's own launch. Shapes: sum [...,Y], overwritten and returned; x [...,X]."""
    sum_ = sum_.contiguous()
    sum_.view(-1, sum_.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight_YX.T)
    return sum_


def _choose(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return gates and experts [T,K], as GlobalBatchRouter chooses."""
    config = router.config
    return topk_routing_with_score_function(
        router.gating(hidden).flatten(0, -2),
        router.topk,
        use_pre_softmax=config.moe_router_pre_softmax,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=router.score_function,
        expert_bias=router.expert_bias,
        router_replay=router.router_replay,  # a bias on the choice: router.BiasedChoice
        dense_output=True,
    )


def _routed(experts: Any, tokens_TX: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> Tensor:
    """Run each token's experts and add them up in fp32. Returns [T,X]."""
    chosen, (tokens, width) = experts_TK.flatten(), tokens_TX.shape
    into = experts.linear_fc1.weight.index_select(0, chosen)  # [T·K,2F,X]
    out_of = experts.linear_fc2.weight.index_select(0, chosen)  # [T·K,X,F]
    gate_up = torch.bmm(into.view(tokens, -1, width), tokens_TX.unsqueeze(-1))
    inner = weighted_swiglu(gate_up.view(len(chosen), -1), gates_TK.flatten())
    parts = torch.bmm(out_of, inner.unsqueeze(-1)).view(tokens, -1, width)
    wide = parts.dtype if parts.dtype == torch.float64 else torch.float32
    return parts.sum(1, dtype=wide).to(parts.dtype)


def _inside_shared(shared: Any, tokens_TX: Tensor) -> Tensor:
    """Run the shared expert up to its last product, its gate on that instead of the output: the same by linearity."""
    gate_up = F.linear(tokens_TX, shared.linear_fc1.weight)
    if shared.gate_weight is None:
        gate_T = gate_up.new_ones(len(tokens_TX))
    else:
        gate_T = F.linear(tokens_TX, shared.gate_weight).sigmoid().flatten()
    return weighted_swiglu(gate_up, gate_T)
