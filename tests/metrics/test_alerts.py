"""Alerts: each kind at its level, none below it, none repeated within the pause, the same after a resume."""

import math
from typing import Any

import pytest

from megatron_q3n.config import validate
from megatron_q3n.config.instruments import AlertsConfig
from megatron_q3n.metrics.alerts import Alert, AlertDetector, alerts_in, num_experts


def config(**alerts: Any) -> Any:
    return validate({"alerts": alerts}).model_dump()


def detector(**alerts: Any) -> AlertDetector:
    return AlertDetector(AlertsConfig(**alerts), num_experts({}))  # 8 experts in 4 layers and MTP: 40


LEVELS = [
    ("experts/load_imbalance", 10.0, 10.5, "expert load", "alerts.expert_load=10"),
    ("attention/first_token_share_max", 0.3, 0.31, "attention sink", "alerts.first_token_share=0.3"),
    ("activations/max_over_median", 1000.0, 2500.0, "massive activations", "2500, above"),
    ("norm_scale/max", 10.0, 12.0, "norm scale", "alerts.norm_scale=10"),
]


@pytest.mark.parametrize(("name", "fine", "bad", "kind", "message_part"), LEVELS)
def test_levels(name: str, fine: float, bad: float, kind: str, message_part: str) -> None:
    alerts = detector()
    assert alerts.update(1, {name: fine}) == []
    (alert,) = alerts.update(2, {name: bad})
    assert (alert.step, alert.kind) == (2, kind)
    assert message_part in alert.message


def test_experts_are_dead_after_a_while() -> None:
    records = [{"step": k, "experts/dead": 3.0 if k not in (10, 50) else 2.0} for k in range(1, 80)]
    found = alerts_in(records, config(pause_steps=10))
    assert [alert.step for alert in found] == [30, 41, 70]
    assert "3 of 40 experts" in found[0].message
    assert "for 20 steps in a row" in found[0].message


def test_null_disables_a_kind() -> None:
    off = dict.fromkeys(("loss_spike_deviations", "dead_experts_share", "expert_load", "first_token_share"))
    alerts = detector(**off, activation_over_median=None, norm_scale=None, growth_factor=None)
    bad = {name: 1e9 for name, *_ in LEVELS} | {"loss/train": math.nan, "experts/dead": 9}
    assert all(alerts.update(step, bad) == [] for step in range(1, 50))


GROWING = [
    ("attention/first_token_share_max", 0.04, 0.12, "sink growth"),
    ("activations/max_over_median", 60.0, 150.0, "activation growth"),
    ("norm_scale/max", 1.2, 2.6, "norm growth"),
]


@pytest.mark.parametrize(("name", "before", "after", "kind"), GROWING)
def test_growth_is_detected_long_before_the_level(name: str, before: float, after: float, kind: str) -> None:
    """Measured every 100 steps: constant, then growing by the same factor each time."""
    rate = (after / before) ** (1 / 8)
    values = [before] * 10 + [before * rate**k for k in range(1, 12)]
    records = [{"step": 100 * k, name: value} for k, value in enumerate(values, start=1)]
    found = [a for a in alerts_in(records, config(pause_steps=10_000)) if a.kind == kind]
    (alert,) = found
    assert 1600 <= alert.step <= 1900, "doubled after about 7 measurements"
    assert "times the" in alert.message
    assert "alerts.growth_factor=2 in 1,000 steps" in alert.message
    assert alerts_in(records, config(growth_factor=None)) == []
    small = [{**record, name: record[name] * 0.01} for record in records]
    assert alerts_in(small, config()) == [], "small numbers may grow"


def test_slow_growth_and_the_start_of_a_run_raise_no_alert() -> None:
    slow = [{"step": 100 * k, "norm_scale/max": 1.5 * 1.06**k} for k in range(1, 30)]
    assert alerts_in(slow, config()) == [], "1.06 ** 10 is less than 2"
    quick = [{"step": k, "norm_scale/max": 0.5 * k} for k in range(1, 19)]
    assert alerts_in(quick, config(growth_steps=100)) == [], "less than half of growth_steps has passed"


def losses(count: int) -> list[dict[str, float]]:
    return [{"step": k, "loss/train": 4 - k / 1000 + (k % 7) / 50} for k in range(1, count + 1)]


def test_a_loss_spike_is_detected_and_noise_is_not() -> None:
    records = losses(300)
    assert alerts_in(records, config()) == []
    records[200]["loss/train"] = 5.5
    (alert,) = alerts_in(records, config())
    assert (alert.step, alert.kind) == (201, "loss spike")


def test_the_first_steps_are_no_spikes_but_nan_is() -> None:
    records = losses(10)
    records[4]["loss/train"] = 90.0
    records[8]["loss/train"] = math.nan
    (alert,) = alerts_in(records, config())
    assert (alert.step, alert.message[:29]) == (9, "the training loss is not fini")


def test_the_pause_applies_to_one_kind() -> None:
    records = [{"step": k, "norm_scale/max": 11.0} for k in range(1, 26)]
    records[4]["experts/load_imbalance"] = 40
    found = [(a.step, a.kind) for a in alerts_in(records, config(pause_steps=10))]
    assert found == [(1, "norm scale"), (5, "expert load"), (12, "norm scale"), (23, "norm scale")]


def test_a_resumed_run_restores_the_state_of_the_alerts() -> None:
    """As in the Recorder: process the existing records again, then continue."""
    records = losses(300)
    for step in (120, 180, 250):
        records[step]["loss/train"] = 9.0
    for step in range(100, 300, 20):
        records[step]["norm_scale/max"] = 1.5 if step < 200 else 4.0
    whole = alerts_in(records, config(pause_steps=50, growth_steps=150))
    assert [alert.kind for alert in whole].count("loss spike") == 3
    assert [alert.kind for alert in whole].count("norm growth") >= 1
    resumed = detector(pause_steps=50, growth_steps=150)
    for record in records[:150]:
        resumed.update(int(record["step"]), record)
    after_resume: list[Alert] = []
    for record in records[150:]:
        after_resume += resumed.update(int(record["step"]), record)
    assert after_resume == whole[1:]
