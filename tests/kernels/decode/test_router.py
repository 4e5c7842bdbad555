"""The choice of experts for a few tokens, fused: the experts and gates of megatron-core's own function.

Without a GPU the kernel runs in Triton's interpreter. What the compiler makes of it: tests/kernels/startup/test_hopper_compiler.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_q3n.kernels.decode.router import Choice, composed_choice, fits, route_few

CHOICES: list[dict[str, Any]] = [
    {},
    {"use_pre_softmax": True},
    {"use_pre_softmax": True, "scaling_factor": 2.5},
    {"score_function": "sigmoid"},
    {"score_function": "sigmoid", "scaling_factor": 0.5},
]


def upstream(logits_TE: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Ask megatron-core, the bias as GlobalBatchRouter gives it."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    class Biased:
        def get_replay_topk(self, scores: Tensor, topk: int, *_: object) -> tuple[Tensor, Tensor]:
            chosen = (scores + choice.bias_E).topk(topk, dim=1).indices
            return scores.gather(1, chosen), chosen

    by_sigmoid = choice.score_function == "sigmoid"
    return topk_routing_with_score_function(
        logits_TE,
        choice.topk,
        use_pre_softmax=choice.use_pre_softmax,
        scaling_factor=choice.scaling_factor,
        score_function=choice.score_function,
        expert_bias=choice.bias_E if by_sigmoid else None,
        router_replay=None if by_sigmoid or choice.bias_E is None else Biased(),
        dense_output=True,
    )


def by_expert(gates_TK: Tensor, experts_TK: Tensor, num_experts: int) -> Tensor:
    return torch.zeros(len(gates_TK), num_experts, device=gates_TK.device).scatter(1, experts_TK, gates_TK)


@pytest.mark.parametrize("settings", CHOICES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "topk", "width"), [(1, 64, 4, 96), (5, 24, 1, 40), (16, 512, 10, 192), (3, 16, 16, 1030)]
)
def test_it_chooses_as_megatron_core(
    tokens: int, experts: int, topk: int, width: int, biased: bool, settings: dict[str, Any], triton_device: str
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(triton_device)
        for shape in ((tokens, width), (experts, width), (experts,))
    )
    choice = Choice(topk, **settings, bias_E=bias / 4 if biased else None)
    weight = weight / width**0.5
    assert fits(choice, experts)
    with torch.no_grad():
        wanted = by_expert(*upstream(x @ weight.T, choice), experts)
        composed = by_expert(*composed_choice(x @ weight.T, choice), experts)
        gates, chosen = route_few(x, weight, choice, fused=True)
    assert chosen.dtype == torch.int64
    for ours in (by_expert(gates, chosen, experts), composed):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_of_equal_scores_the_lower_expert_wins(triton_device: str) -> None:
    from megatron_q3n.kernels.decode.router_triton import choose_few

    infinity = float("inf")
    rows = [
        [0.0] * 6,
        [1, 3, 3, 2, 3, -5],
        [-infinity] * 6,
        [-infinity, 2, -infinity, 1, -1, -2],
        [-2, -1, -3, -1, -1, -9],
    ]
    logits = torch.tensor(rows, device=triton_device)
    gates, chosen = choose_few(logits, Choice(3, use_pre_softmax=True))
    assert chosen.tolist() == [[0, 1, 2], [1, 2, 4], [0, 1, 2], [1, 3, 4], [1, 3, 4]]
    assert gates[[0, 1, 3, 4]].isfinite().all()


def test_not_a_number_still_names_experts(triton_device: str) -> None:
    """What follows reads their weights: a number that is no expert would read anywhere."""
    from megatron_q3n.kernels.decode.router_triton import choose_few

    logits = torch.full((2, 6), float("nan"), device=triton_device)
    logits[1, :4] = 1.0
    for choice in (Choice(2), Choice(2, use_pre_softmax=True), Choice(2, "sigmoid")):
        chosen = choose_few(logits, choice)[1]
        assert ((chosen >= 0) & (chosen < 6)).all()
        assert (chosen[:, 0] != chosen[:, 1]).all()


def test_what_the_kernel_does_not_know() -> None:
    assert not fits(Choice(2, "sqrtsoftplus"), 8)
    assert not fits(Choice(17), 64)
    assert not fits(Choice(2), 513)
