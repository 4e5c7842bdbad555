"""Policy losses and their gradients against the papers' formulas, computed sample by sample in fp64."""

import math

import pytest
import torch
from torch import Tensor

from megatron_q3n.config.rl import ALGORITHMS
from megatron_q3n.rl.advantages import token_weights
from megatron_q3n.rl.policy_loss import clipped_surrogate, kl_to_reference, log_ratios, truncated_importance

LONGEST = 12


class Case:
    """Random samples: a few tokens each, ratios on both sides of every clip, advantages of both signs."""

    def __init__(self, seed: int, spread: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(1, LONGEST, (5,), generator=generator).tolist()
        draw = lambda n: torch.randn(n, generator=generator, dtype=torch.float64)
        self.new = [(-1 + spread * draw(n)).requires_grad_() for n in self.lengths]
        self.old = [new.detach() + spread * draw(n) for new, n in zip(self.new, self.lengths)]
        self.rollout = [old + 0.3 * draw(len(old)) for old in self.old]
        self.advantages = draw(5).tolist()

    def packed(self, parts: list[Tensor]) -> Tensor:
        """Concatenate samples to a row, with a gap before each and after the last."""
        gap = torch.full((2,), -50.0, dtype=torch.float64)
        return torch.cat([x for part in parts for x in (gap, part)] + [gap])

    def sample(self) -> Tensor:
        numbers = [torch.full((n,), i) for i, n in enumerate(self.lengths)]
        return self.packed([n.double() for n in numbers]).long().clamp(min=-1)


def packed_loss(case: Case, algorithm: str, cap: float | None) -> Tensor:
    rules = ALGORITHMS[algorithm]
    sample_T = case.sample()
    is_response_T = sample_T >= 0
    weights = token_weights(torch.tensor(case.lengths).numpy(), rules.normalisation, LONGEST)
    index_T = sample_T.clamp(min=0)
    weight_T = torch.where(is_response_T, torch.from_numpy(weights)[index_T], 0.0)
    advantage_T = torch.where(is_response_T, torch.tensor(case.advantages).double()[index_T], 0.0)
    ratio_T = log_ratios(case.packed(case.new), case.packed(case.old), sample_T, rules.ratio)
    losses = clipped_surrogate(ratio_T, advantage_T, rules.clip_low, rules.clip_high)
    importance_T = truncated_importance(case.packed(case.old), case.packed(case.rollout), cap)
    return (weight_T * importance_T * losses.loss_T).sum()


def reference_loss(case: Case, algorithm: str, cap: float | None) -> Tensor:
    """The objective of each paper, negated."""
    low, high = {"gspo": (3e-4, 4e-4), "grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28)}[algorithm]
    per_sample = []
    for new, old, rollout, advantage in zip(case.new, case.old, case.rollout, case.advantages):
        ratios = (new - old).exp()
        if algorithm == "gspo":  # s_i = (π(y) / π_old(y)) ^ (1/|y|)
            ratios = ((new.sum() - old.sum()) / len(new)).exp().expand(len(new))
        terms = []
        for t in range(len(new)):
            clipped = min(max(ratios[t].item(), 1 - low), 1 + high)
            term = torch.minimum(ratios[t] * advantage, torch.tensor(clipped) * advantage)
            if 1 - low < ratios[t].item() < 1 + high:
                term = ratios[t] * advantage
            weight = 1.0 if cap is None else min(math.exp(old[t] - rollout[t]), cap)
            terms.append(weight * term)
        per_sample.append(torch.stack(terms))
    if algorithm in ("gspo", "grpo"):
        return -torch.stack([terms.mean() for terms in per_sample]).mean()
    if algorithm == "dapo":
        return -torch.cat(per_sample).mean()
    return -torch.stack([terms.sum() / LONGEST for terms in per_sample]).mean()


@pytest.mark.parametrize("cap", [None, 1.1])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("seed", range(6))
def test_loss_and_gradient_equal_the_papers_formulas(seed: int, algorithm: str, cap: float | None) -> None:
    spread = 3e-4 if algorithm == "gspo" and seed % 2 else 0.3
    packed_case, reference_case = Case(seed, spread), Case(seed, spread)
    packed = packed_loss(packed_case, algorithm, cap)
    expected = reference_loss(reference_case, algorithm, cap)
    torch.testing.assert_close(packed, expected)
    packed.backward()
    expected.backward()
    for actual, expected_new in zip(packed_case.new, reference_case.new):
        torch.testing.assert_close(actual.grad, expected_new.grad)


def test_gradient_is_zero_beyond_the_clip_where_the_objective_improves() -> None:
    log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5]).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    losses = clipped_surrogate(log_ratio, advantage, 0.2, 0.28)
    losses.loss_T.sum().backward()
    assert losses.is_clipped_T.tolist() == [True, False, False, True]
    assert log_ratio.grad is not None
    assert (log_ratio.grad != 0).tolist() == [False, True, True, False]


def test_kl_estimate_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    estimates = kl_to_reference(policy, reference)
    exact = (policy.exp() * (policy - reference)).sum()
    assert (estimates >= 0).all()
    assert (policy.exp() * estimates).sum().item() == pytest.approx(exact.item(), abs=1e-12)
