"""Advantages and token weights against the formulas written out, on random cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_q3n.rl.advantages import even_groups, group_advantages, overlong_penalties, token_weights


def groups_of(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    group = generator.integers(0, 4, 24)
    return generator.choice([0.0, 0.5, 1.0, -1.0], 24), group


@pytest.mark.parametrize("seed", range(5))
def test_advantages_are_written_out(seed: int) -> None:
    rewards, group = groups_of(seed)
    grpo = group_advantages(rewards, group, "std")
    dr_grpo = group_advantages(rewards, group, "none")
    for i in range(len(rewards)):
        mine = [r for r, g in zip(rewards, group) if g == group[i]]
        mean = sum(mine) / len(mine)
        deviation = (sum((r - mean) ** 2 for r in mine) / len(mine)) ** 0.5
        assert dr_grpo[i] == pytest.approx(rewards[i] - mean, abs=1e-12)
        assert grpo[i] == pytest.approx((rewards[i] - mean) / (deviation + 1e-6), abs=1e-12)


def test_an_even_group_teaches_nothing() -> None:
    rewards, group = np.array([1.0, 1.0, 0.0, 1.0]), np.array([7, 7, 9, 9])
    assert group_advantages(rewards, group, "std")[:2].tolist() == [0, 0]
    assert even_groups(rewards, group).tolist() == [True, True, False, False]


@given(st.integers(1, 200), st.integers(0, 99), st.floats(0, 3))
@settings(max_examples=50, deadline=None)
def test_overlong_penalty_is_equation_13(length: int, buffer: int, penalty: float) -> None:
    longest = 100
    (found,) = overlong_penalties(np.array([length]), longest, buffer, penalty)
    if buffer == 0 or length <= longest - buffer:
        expected = 0.0
    elif length <= longest:
        expected = penalty * ((longest - buffer) - length) / buffer
    else:
        expected = -penalty
    assert found == pytest.approx(expected, abs=1e-12)


def test_token_weights_are_the_algorithms() -> None:
    lengths, longest = np.array([1, 4, 5]), 8
    losses = [np.random.default_rng(n).normal(size=n) for n in lengths]

    def total(normalisation: str) -> float:
        weights = token_weights(lengths, normalisation, longest)  # type: ignore[arg-type]
        return float(sum((w * x).sum() for w, x in zip(weights, losses)))

    assert total("sequence") == pytest.approx(np.mean([x.mean() for x in losses]))
    assert total("token") == pytest.approx(np.concatenate(losses).mean())
    assert total("constant") == pytest.approx(np.mean([x.sum() / longest for x in losses]))
