"""Throughput meters: time per step, tokens per second, model FLOP/s and MFU.

Plain Python, no torch. FLOPs per token come from `config/sizes.py`, the peak rate from `device/`; both are arguments,
so that this file depends on neither the model nor the machine. On a GPU the caller synchronizes before each lap.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable

TERA = 1e12


class StepTimer:
    """Timer for training steps with a window of the recent ones.

    `lap()` measures from the previous lap. `restart()` discards the time since then, so that a validation or checkpoint
    between two steps is not counted.
    """

    def __init__(self, window_steps: int = 50, clock: Callable[[], float] = time.perf_counter) -> None:
        assert window_steps > 0, window_steps
        self._clock = clock
        self._seconds: deque[float] = deque(maxlen=window_steps)
        self._tokens: deque[int] = deque(maxlen=window_steps)
        self._since = clock()

    def restart(self) -> None:
        """Discard the time since the last lap."""
        self._since = self._clock()

    def lap(self, tokens: int) -> float:
        """End a step of `tokens` tokens (over all ranks) and return its seconds."""
        now = self._clock()
        seconds, self._since = now - self._since, now
        self._seconds.append(seconds)
        self._tokens.append(tokens)
        return seconds

    @property
    def median_seconds(self) -> float | None:
        """Median seconds of the recent steps; None before the first. Robust against single slow steps."""
        return statistics.median(self._seconds) if self._seconds else None

    @property
    def mean_seconds(self) -> float | None:
        """Mean seconds of the recent steps; None before the first. Includes slow steps, as an ETA must."""
        return statistics.fmean(self._seconds) if self._seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second over the recent steps; None before the first."""
        total = sum(self._seconds)
        return sum(self._tokens) / total if total > 0 else None

    def eta_seconds(self, remaining_steps: int) -> float | None:
        """Return the estimated seconds for `remaining_steps` at the recent mean step time, None before a first step."""
        mean = self.mean_seconds
        return None if mean is None else mean * remaining_steps


def throughput(tokens: int, seconds: float, flops_per_token: float, peak_flops: float | None) -> dict[str, float]:
    """Return the throughput metrics of one step.

    Units: `tokens` over all ranks; `flops_per_token` model FLOPs of forward and backward; `peak_flops` FLOP/s of all
        devices together. If it is None (unknown), there is no MFU.
    Reference: model FLOPs utilization, PaLM (arXiv 2204.02311), appendix B.
    """
    assert tokens > 0, tokens
    assert seconds > 0, seconds
    flops_per_second = tokens * flops_per_token / seconds
    values = {
        "throughput/tokens_per_second": tokens / seconds,
        "throughput/step_seconds": seconds,
        "throughput/model_tflops_per_second": flops_per_second / TERA,
    }
    if peak_flops is not None:
        values["throughput/mfu"] = flops_per_second / peak_flops
    return values
