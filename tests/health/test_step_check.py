"""Detection of bad steps, and the action that the policy takes."""

import math

import pytest

from megatron_q3n.config.health import HealthConfig
from megatron_q3n.health.step_check import StepCheck


def check_with_history(**settings: object) -> StepCheck:
    """Return a check with a history of 40 sound steps: losses 3.0 … 3.3 and norms 1.0 … 1.3."""
    check = StepCheck(HealthConfig.model_validate(settings))
    check.set_history((3 + 0.1 * (n % 4), 1 + 0.1 * (n % 4)) for n in range(40))
    return check


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (3.0, math.nan), (math.inf, 1.0), (3.0, math.inf)])
@pytest.mark.parametrize("policy", ["skip", "roll_back", "stop"])
def test_a_non_finite_step_is_bad(loss: float, norm: float, policy: str) -> None:
    bad_step = check_with_history(non_finite=policy).check(7, loss, norm)
    assert bad_step is not None
    assert (bad_step.kind, bad_step.action, bad_step.step) == ("non_finite", policy, 7)


@pytest.mark.parametrize(("loss", "norm", "named"), [(9.0, 1.0, "loss"), (3.1, 8.0, "gradient norm")])
def test_a_spike_is_detected_in_loss_and_gradient(loss: float, norm: float, named: str) -> None:
    bad_step = check_with_history(loss_spike="skip").check(50, loss, norm)
    assert bad_step is not None
    assert bad_step.kind == "loss_spike"
    assert f"{named} above" in bad_step.description
    assert check_with_history(loss_spike="ignore").check(50, loss, norm) is None


def test_ordinary_noise_is_no_spike() -> None:
    assert check_with_history(loss_spike="skip").check(50, 3.5, 1.6) is None


def test_no_spike_is_detected_before_the_history_suffices() -> None:
    check = StepCheck(HealthConfig(loss_spike="stop", spike_min_steps=20))
    for step in range(20):
        assert check.check(step, 100.0 if step == 19 else 3.0 + 0.01 * (step % 3), 1.0) is None


def test_bad_steps_do_not_move_what_is_normal() -> None:
    check = check_with_history(loss_spike="skip", max_consecutive_bad_steps=100)
    assert all(check.check(step, 9.0, 1.0) is not None for step in range(50))


def test_too_many_bad_steps_in_a_row_stop_the_run() -> None:
    check = check_with_history(max_consecutive_bad_steps=3)
    actions = [check.check(step, math.nan, 1.0) for step in range(2)]
    assert [bad_step and bad_step.action for bad_step in actions] == ["skip", "skip"]
    assert check.check(3, 3.0, 1.0) is None, "a sound step between them"
    actions = [check.check(step, math.nan, 1.0) for step in range(3)]
    assert [bad_step and bad_step.action for bad_step in actions] == ["skip", "skip", "stop"]
