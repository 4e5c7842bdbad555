"""Decode experts: the MoE layer for few tokens, without sorting, counting or host synchronization.

The path for many tokens (model/moe/token_dispatcher.py: permute the tokens, one grouped GEMM over all experts,
unpermute) consists mostly of kernel launches when there are only a few tokens. Here two kernels read the selected
experts' weights in place (kernels/decode/experts.py); without them the weights are gathered by index and multiplied as
a batch. The sums of each token are the same. Weights are read once per token, so this suits small numbers of tokens
only.

Requires: no gradients, and one process that holds all experts and all dense weights.

Shapes: T tokens, K experts of each, F an expert's hidden size, X hidden size.
"""

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch import Tensor

from megatron_q3n.config.execution_plan import DecodePlan
from megatron_q3n.kernels.decode import experts as kernels
from megatron_q3n.kernels.decode import router as decode_router
from megatron_q3n.model.decode.fused_linear import norm_weights, uses_decode_gemm
from megatron_q3n.model.decode.protocols import MoELayer
from megatron_q3n.model.moe.router import BiasedTopK, GlobalBatchRouter
from megatron_q3n.model.protocols import Norm


def runs_in_place(moe: MoELayer, num_tokens: int) -> bool:
    """Return whether `add_moe_output` runs so many tokens: the plan's limit, no gradients, no recorded routes."""
    plan: DecodePlan = moe.config.plan.decode
    return (
        bool(plan.experts) and num_tokens <= plan.experts_max_tokens and not torch.is_grad_enabled() and _is_idle(moe)
    )


def runs_without_host_sync(moe: MoELayer, num_tokens: int) -> bool:
    """Return whether the layer runs so many tokens without host synchronization, on either path."""
    plan: DecodePlan = moe.config.plan.decode
    return runs_in_place(moe, num_tokens) or (bool(plan.moe_without_host_sync) and _is_idle(moe))


def _is_idle(moe: MoELayer) -> bool:
    """Return whether nothing records or replaces the routes of this layer now."""
    hook = moe.config.pass_state.routing.get(moe.router)
    return hook is None or not hook.is_active


def add_moe_output(moe: MoELayer, hidden: Tensor, residual: Tensor, norm: Norm | None = None) -> Tensor:
    """Add the MoE layer's output for few tokens to the residual.

    Shapes: hidden, residual [...,X]. `norm` is the layer's, or None if `hidden` is normalized already.
    Returns: the sum [...,X], in the residual's memory if the dtypes agree.
    """
    plan: DecodePlan = moe.config.plan.decode
    tokens_TX, residual_TX = hidden.flatten(0, -2), residual.flatten(0, -2)
    if norm is not None and plan.norm_in_router and uses_decode_gemm(plan, hidden, moe.router.weight):
        arguments = tokens_TX, norm_weights(norm, moe.config), moe.router.weight, router_config(moe.router)
        tokens_TX, gates_TK, experts_TK = decode_router.decode_norm_route(*arguments)
    else:
        if norm is not None:
            hidden = norm(hidden)
            tokens_TX = hidden.flatten(0, -2)
        gates_TK, experts_TK = _route(moe.router, hidden, fused=bool(plan.router))
    added = kernels.decode_experts(
        tokens_TX, residual_TX, experts_TK, gates_TK, _expert_weights(moe), bool(plan.experts_kernel)
    )
    return added.view(residual.shape)


def _expert_weights(moe: MoELayer) -> kernels.ExpertWeights:
    routed = moe.experts.linear_fc1.weight, moe.experts.linear_fc2.weight
    shared = moe.shared_experts
    if shared is None:
        return kernels.ExpertWeights(*routed)
    linears = shared.linear_fc1.weight, shared.linear_fc2.weight
    return kernels.ExpertWeights(*routed, *linears, shared.gate_weight)


def _route(router: GlobalBatchRouter, hidden: Tensor, *, fused: bool) -> tuple[Tensor, Tensor]:
    """Return gates and experts [T,K], as GlobalBatchRouter selects them."""
    config = router.config
    if fused:
        return decode_router.decode_route(hidden.flatten(0, -2), router.weight, router_config(router), fused=True)
    return topk_routing_with_score_function(
        router.gating(hidden).flatten(0, -2),
        router.topk,
        use_pre_softmax=config.moe_router_pre_softmax,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=router.score_function,
        expert_bias=router.expert_bias,
        # a bias on the selection only: BiasedTopK
        router_replay=router.router_replay,
        dense_output=True,
    )


def router_config(router: GlobalBatchRouter) -> decode_router.RouterConfig:
    """Describe a router for the decode router kernel; only with `decode.router` in the plan."""
    config = router.config
    return decode_router.RouterConfig(
        router.topk,
        router.score_function,
        config.moe_router_pre_softmax,
        config.moe_router_topk_scaling_factor,
        router.expert_bias if isinstance(router.router_replay, BiasedTopK) else None,
    )
