"""The experts of a few tokens: no sorting, no counts, nothing that waits for the GPU.

What serves thousands of tokens (model/moe/token_dispatcher.py: plan rows, copy tokens to them, one grouped product over
all experts, copy back) costs a token of decoding mostly launches, and megatron-core's layers around it
more Python than a GPU needs for the work. Here two kernels read the chosen experts' weights where they lie
(kernels/decode/experts.py). As plain torch the weights are copied by index and multiplied as a batch of
matrices. Token by token they are the same sums; weights are read once per token, which is why it is for few.

Only without gradients, where one process holds all experts and dense weights whole.

Shapes: T tokens, K experts of each, F an expert's hidden size, X hidden size.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch import Tensor, nn

from megatron_q3n.kernels import registry
from megatron_q3n.kernels.decode import experts as kernels
from megatron_q3n.kernels.decode import router as decode_router
from megatron_q3n.kernels.moe import grouped_linear, permutation
from megatron_q3n.model.decode.fused_linear import is_few, row_norm
from megatron_q3n.model.moe.router import BiasedChoice
from megatron_q3n.model.moe.routing_replay import RouteTape
from megatron_q3n.model.moe.token_dispatcher import LocalDispatcher

MOST_TOKENS = 16
MOST_COPIED_BYTES = 64 * 2**20  # by reckoning 45 µs of copying on an H200; not measured


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
    fused = registry.lacking((permutation.OPERATION, grouped_linear.OPERATION)) == []
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


def add_few_experts(moe: Any, hidden: Tensor, residual: Tensor, norm: nn.Module | None = None) -> Tensor:
    """Add what the MoE layer returns for a few tokens to the residual, where that lies if formats agree.

    Shapes: hidden, residual [...,X]; returns the same. `norm` is the layer's, or None where it was done.
    """
    choice = plain_choice(moe.router)
    tokens_TX, residual_TX = hidden.flatten(0, -2), residual.flatten(0, -2)
    if norm is not None and choice is not None and _norms_with_choice(moe, hidden):
        given = tokens_TX, row_norm(norm, moe.config), moe.router.weight, choice
        tokens_TX, gates_TK, experts_TK = decode_router.norm_and_route_few(*given)
    else:
        if norm is not None:
            hidden = norm(hidden)
            tokens_TX = hidden.flatten(0, -2)
        gates_TK, experts_TK = _choose(moe.router, choice, hidden)
    added = kernels.add_few_experts(tokens_TX, residual_TX, experts_TK, gates_TK, _weights(moe))
    return added.view(residual.shape)


def _norms_with_choice(moe: Any, hidden: Tensor) -> bool:
    """Whether the norm goes into the launch of the router's product."""
    fused = registry.is_fused(decode_router.OPERATION, hidden)
    return fused and is_few(hidden, moe.config, moe.tp_group, moe.router.weight)


def _weights(moe: Any) -> kernels.ExpertWeights:
    own = moe.experts.linear_fc1.weight, moe.experts.linear_fc2.weight
    shared = moe.shared_experts
    if shared is None:
        return kernels.ExpertWeights(*own)
    linears = shared.linear_fc1.weight, shared.linear_fc2.weight
    return kernels.ExpertWeights(*own, *linears, shared.gate_weight)


def _choose(router: Any, choice: decode_router.Choice | None, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return gates and experts [T,K], as GlobalBatchRouter chooses."""
    config = router.config
    if choice is not None and registry.is_fused(decode_router.OPERATION, hidden):
        return decode_router.route_few(hidden.flatten(0, -2), router.weight, choice)
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


def plain_choice(router: Any) -> decode_router.Choice | None:
    """Say how a router chooses, if `few_routes` knows it: no groups, in fp32, with a bias in one of its ways."""
    config, replay = router.config, router.router_replay
    grouped = config.moe_router_num_groups or config.moe_router_group_topk
    by_bias = isinstance(replay, BiasedChoice) and router.score_function == "softmax"
    unbiased = replay is None and router.expert_bias is None
    if grouped or config.moe_router_dtype != "fp32" or not (by_bias or unbiased):
        return None
    choice = decode_router.Choice(
        router.topk,
        router.score_function,
        config.moe_router_pre_softmax,
        config.moe_router_topk_scaling_factor,
        router.expert_bias if by_bias else None,
    )
    return choice if decode_router.fits(choice, router.weight.shape[0]) else None
