"""Decode router, fused: the experts and gates of megatron-core's own function.

Without a GPU the kernel runs in Triton's interpreter. Compiled code: tests/kernels/startup/test_hopper_compiler.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_q3n.config.execution_plan import Decision, Kernel
from megatron_q3n.kernels.decode.operands import RouterConfig
from megatron_q3n.kernels.decode.router import decode_route, route_reference
from tests.execution_plans import fused_plan
from tests.inference.tiny_model import tiny_config

CONFIGS: list[dict[str, Any]] = [
    {},
    {"use_pre_softmax": True},
    {"use_pre_softmax": True, "scaling_factor": 2.5},
    {"score_function": "sigmoid"},
    {"score_function": "sigmoid", "scaling_factor": 0.5},
]


def route_with_megatron(logits_TE: Tensor, config: RouterConfig) -> tuple[Tensor, Tensor]:
    """Route with megatron-core, with the bias passed as GlobalBatchRouter does."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    class BiasedReplay:
        def get_replay_topk(self, scores: Tensor, topk: int, *_: object) -> tuple[Tensor, Tensor]:
            selected = (scores + config.bias_E).topk(topk, dim=1).indices
            return scores.gather(1, selected), selected

    by_sigmoid = config.score_function == "sigmoid"
    return topk_routing_with_score_function(
        logits_TE,
        config.topk,
        use_pre_softmax=config.use_pre_softmax,
        scaling_factor=config.scaling_factor,
        score_function=config.score_function,
        expert_bias=config.bias_E if by_sigmoid else None,
        router_replay=None if by_sigmoid or config.bias_E is None else BiasedReplay(),
        dense_output=True,
    )


def by_expert(gates_TK: Tensor, experts_TK: Tensor, num_experts: int) -> Tensor:
    return torch.zeros(len(gates_TK), num_experts, device=gates_TK.device).scatter(1, experts_TK, gates_TK)


def planned(topk: int, experts: int, score_function: str) -> Decision:
    """Return the plan's decision for a model with such a router."""
    megatron = {"moe_router_score_function": score_function}
    config = tiny_config(moe_router_topk=topk, num_moe_experts=experts, megatron=megatron)
    return fused_plan(config, {Kernel.DECODE_ROUTER}).decode.router


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "topk", "width"), [(1, 64, 4, 96), (5, 24, 1, 40), (16, 512, 10, 192), (3, 16, 16, 1030)]
)
def test_routes_as_megatron_core(
    tokens: int, experts: int, topk: int, width: int, biased: bool, settings: dict[str, Any], triton_device: str
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(triton_device)
        for shape in ((tokens, width), (experts, width), (experts,))
    )
    config = RouterConfig(topk, **settings, bias_E=bias / 4 if biased else None)
    weight = weight / width**0.5
    score = settings.get("score_function", "softmax")
    assert planned(topk, experts, score)
    with torch.no_grad():
        expected = by_expert(*route_with_megatron(x @ weight.T, config), experts)
        reference = by_expert(*route_reference(x @ weight.T, config), experts)
        gates, selected = decode_route(x, weight, config, fused=True)
    assert selected.dtype == torch.int64
    for actual in (by_expert(gates, selected, experts), reference):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_lower_expert_wins_among_equal_scores(triton_device: str) -> None:
    from megatron_q3n.kernels.decode.router_triton import decode_topk

    infinity = float("inf")
    rows = [
        [0.0] * 6,
        [1, 3, 3, 2, 3, -5],
        [-infinity] * 6,
        [-infinity, 2, -infinity, 1, -1, -2],
        [-2, -1, -3, -1, -1, -9],
    ]
    logits = torch.tensor(rows, device=triton_device)
    gates, selected = decode_topk(logits, RouterConfig(3, use_pre_softmax=True))
    assert selected.tolist() == [[0, 1, 2], [1, 2, 4], [0, 1, 2], [1, 3, 4], [1, 3, 4]]
    assert gates[[0, 1, 3, 4]].isfinite().all()


def test_nan_scores_give_valid_experts(triton_device: str) -> None:
    """Their weights are read next: an index out of range would read arbitrary memory."""
    from megatron_q3n.kernels.decode.router_triton import decode_topk

    logits = torch.full((2, 6), float("nan"), device=triton_device)
    logits[1, :4] = 1.0
    for config in (RouterConfig(2), RouterConfig(2, use_pre_softmax=True), RouterConfig(2, "sigmoid")):
        selected = decode_topk(logits, config)[1]
        assert ((selected >= 0) & (selected < 6)).all()
        assert (selected[:, 0] != selected[:, 1]).all()


@pytest.mark.parametrize(
    ("topk", "experts", "score_function", "reason"),
    [
        (2, 8, "sqrtsoftplus", "moe_router_score_function=sqrtsoftplus"),
        (17, 64, "softmax", "more than 16 experts per token"),
        (2, 513, "softmax", "more than 512 experts"),
    ],
)
def test_unsupported_routing_is_in_no_plan(topk: int, experts: int, score_function: str, reason: str) -> None:
    decision = planned(topk, experts, score_function)
    assert not decision
    assert reason in (decision.reason or "")
