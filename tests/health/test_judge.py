"""What counts as a bad step, and what policy makes of it."""

import math

import pytest

from megatron_q3n.config.health import HealthConfig
from megatron_q3n.health.judge import Judge


def seasoned(**settings: object) -> Judge:
    """Return a judge that saw 40 sound steps: losses 3.0 … 3.3 and norms 1.0 … 1.3."""
    judge = Judge(HealthConfig.model_validate(settings))
    judge.remember((3 + 0.1 * (n % 4), 1 + 0.1 * (n % 4)) for n in range(40))
    return judge


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (3.0, math.nan), (math.inf, 1.0), (3.0, math.inf)])
@pytest.mark.parametrize("policy", ["skip", "roll_back", "stop"])
def test_what_is_not_finite_is_trouble(loss: float, norm: float, policy: str) -> None:
    trouble = seasoned(non_finite=policy).examine(7, loss, norm)
    assert trouble is not None
    assert (trouble.kind, trouble.action, trouble.step) == ("non_finite", policy, 7)


@pytest.mark.parametrize(("loss", "norm", "named"), [(9.0, 1.0, "loss"), (3.1, 8.0, "gradient norm")])
def test_a_spike_is_seen_in_loss_and_gradient(loss: float, norm: float, named: str) -> None:
    trouble = seasoned(loss_spike="skip").examine(50, loss, norm)
    assert trouble is not None
    assert trouble.kind == "loss_spike"
    assert f"{named} above" in trouble.what
    assert seasoned(loss_spike="ignore").examine(50, loss, norm) is None


def test_ordinary_noise_is_no_spike() -> None:
    assert seasoned(loss_spike="skip").examine(50, 3.5, 1.6) is None


def test_no_spike_is_seen_before_there_is_enough_to_compare_with() -> None:
    judge = Judge(HealthConfig(loss_spike="stop", spike_minimum_steps=20))
    for step in range(20):
        assert judge.examine(step, 100.0 if step == 19 else 3.0 + 0.01 * (step % 3), 1.0) is None


def test_bad_steps_do_not_move_what_is_normal() -> None:
    judge = seasoned(loss_spike="skip", max_troubles_in_a_row=100)
    assert all(judge.examine(step, 9.0, 1.0) is not None for step in range(50))


def test_too_many_bad_steps_in_a_row_stop_the_run() -> None:
    judge = seasoned(max_troubles_in_a_row=3)
    actions = [judge.examine(step, math.nan, 1.0) for step in range(2)]
    assert [trouble and trouble.action for trouble in actions] == ["skip", "skip"]
    assert judge.examine(3, 3.0, 1.0) is None, "a sound step between them"
    actions = [judge.examine(step, math.nan, 1.0) for step in range(3)]
    assert [trouble and trouble.action for trouble in actions] == ["skip", "skip", "stop"]
