"""Advantages and token weights against direct implementations of the formulas, on random cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_q3n.rl.advantages import group_advantages, overlong_penalties, token_weights, zero_variance_groups

ALL = np.ones(24, bool)


def groups_of(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    group = generator.integers(0, 4, 24)
    return generator.choice([0.0, 0.5, 1.0, -1.0], 24), group


@pytest.mark.parametrize("seed", range(5))
def test_advantages_equal_the_formulas(seed: int) -> None:
    rewards, group = groups_of(seed)
    is_scored = np.random.default_rng(seed + 100).random(24) < 0.8
    grpo = group_advantages(rewards, group, "std", is_scored)
    dr_grpo = group_advantages(rewards, group, "none", is_scored)
    assert not grpo[~is_scored].any()
    assert not dr_grpo[~is_scored].any()
    for i in np.flatnonzero(is_scored):
        group_rewards = [r for r, g, scored in zip(rewards, group, is_scored) if g == group[i] and scored]
        mean = sum(group_rewards) / len(group_rewards)
        deviation = (sum((r - mean) ** 2 for r in group_rewards) / len(group_rewards)) ** 0.5
        assert dr_grpo[i] == pytest.approx(rewards[i] - mean, abs=1e-12)
        assert grpo[i] == pytest.approx((rewards[i] - mean) / (deviation + 1e-6), abs=1e-12)


def test_a_zero_variance_group_has_zero_advantage() -> None:
    rewards, group = np.array([1.0, 1.0, 0.0, 1.0]), np.array([7, 7, 9, 9])
    assert group_advantages(rewards, group, "std", ALL[:4])[:2].tolist() == [0, 0]
    assert zero_variance_groups(rewards, group, ALL[:4]).tolist() == [True, True, False, False]


def test_a_failed_scoring_is_not_the_best_of_its_group() -> None:
    """The failure score 0 is above the group's scores; a group in which fewer than two were scored has no advantage."""
    rewards, group = np.array([0.0, -1.0, -3.0, 0.0, -1.0, 0.0]), np.array([1, 1, 1, 2, 2, 3])
    is_scored = np.array([False, True, True, False, True, False])
    assert group_advantages(rewards, group, "none", is_scored).tolist() == [0, 1, -1, 0, 0, 0]
    assert zero_variance_groups(rewards, group, is_scored).tolist() == [False] * 3 + [True] * 3


@given(st.integers(1, 200), st.integers(0, 99), st.floats(0, 3))
@settings(max_examples=50, deadline=None)
def test_overlong_penalty_is_equation_13(length: int, buffer: int, penalty: float) -> None:
    max_tokens = 100
    (actual,) = overlong_penalties(np.array([length]), max_tokens, buffer, penalty)
    if buffer == 0 or length <= max_tokens - buffer:
        expected = 0.0
    elif length <= max_tokens:
        expected = penalty * ((max_tokens - buffer) - length) / buffer
    else:
        expected = -penalty
    assert actual == pytest.approx(expected, abs=1e-12)


def test_token_weights_equal_each_algorithms_mean() -> None:
    lengths, max_tokens = np.array([1, 4, 5]), 8
    losses = [np.random.default_rng(n).normal(size=n) for n in lengths]

    def total(normalisation: str) -> float:
        weights = token_weights(lengths, normalisation, max_tokens)  # type: ignore[arg-type]
        return float(sum((w * x).sum() for w, x in zip(weights, losses)))

    assert total("sequence") == pytest.approx(np.mean([x.mean() for x in losses]))
    assert total("token") == pytest.approx(np.concatenate(losses).mean())
    assert total("constant") == pytest.approx(np.mean([x.sum() / max_tokens for x in losses]))
