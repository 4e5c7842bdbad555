"""Throughput and MFU against numbers computed by hand, with a simulated clock."""

import pytest

from megatron_q3n.metrics.meters import StepTimer, throughput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_laps_exclude_pauses() -> None:
    clock = Clock()
    timer = StepTimer(clock=clock)
    clock.now += 2
    assert timer.lap(10) == 2
    clock.now += 50  # a validation
    timer.restart()
    clock.now += 4
    assert timer.lap(20) == 4
    assert timer.tokens_per_second == 5
    assert timer.median_seconds == 3
    assert timer.eta_seconds(10) == 30


def test_window_forgets_old_steps() -> None:
    clock = Clock()
    timer = StepTimer(window_steps=2, clock=clock)
    for seconds in (1000, 1, 3):
        clock.now += seconds
        timer.lap(8)
    assert timer.mean_seconds == 2
    assert timer.tokens_per_second == 4


def test_values_are_none_before_the_first_step() -> None:
    timer = StepTimer()
    assert timer.median_seconds is None
    assert timer.tokens_per_second is None
    assert timer.eta_seconds(5) is None


def test_throughput_by_hand() -> None:
    values = throughput(tokens=1000, seconds=0.5, flops_per_token=6e9, peak_flops=4e13)
    assert values == {
        "throughput/tokens_per_second": 2000,
        "throughput/step_seconds": 0.5,
        "throughput/model_tflops_per_second": 12,
        "throughput/mfu": pytest.approx(0.3),
    }


def test_no_peak_no_mfu() -> None:
    assert "throughput/mfu" not in throughput(10, 1.0, 1.0, None)
