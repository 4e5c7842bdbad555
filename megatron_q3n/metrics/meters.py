"""How fast a run goes: time per step, tokens per second, model FLOP/s and its share of the hardware's peak.

Plain Python, no torch. FLOPs per token come from `model/sizes.py`, the peak from `device.py`; both are
arguments, so that this file knows neither the model nor the machine. On a GPU the caller synchronises before it
reads the clock.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable

TERA = 1e12


class StepTimer:
    """Time steps and keep the recent ones.

    `lap()` measures from the previous lap; `restart()` begins afresh, so that a validation or a checkpoint
    between two steps is counted to neither.
    """

    def __init__(self, window_steps: int = 50, clock: Callable[[], float] = time.perf_counter) -> None:
        assert window_steps > 0, window_steps
        self._clock = clock
        self._seconds: deque[float] = deque(maxlen=window_steps)
        self._tokens: deque[int] = deque(maxlen=window_steps)
        self._since = clock()

    def restart(self) -> None:
        """Forget the time since the last lap."""
        self._since = self._clock()

    def lap(self, tokens: int) -> float:
        """End a step that consumed `tokens` (over all ranks) and return its seconds."""
        now = self._clock()
        seconds, self._since = now - self._since, now
        self._seconds.append(seconds)
        self._tokens.append(tokens)
        return seconds

    @property
    def median_seconds(self) -> float | None:
        """Median seconds of the recent steps; None before the first. One slow step does not move it."""
        return statistics.median(self._seconds) if self._seconds else None

    @property
    def mean_seconds(self) -> float | None:
        """Mean seconds of the recent steps; None before the first. Pauses count, as they should for an ETA."""
        return statistics.fmean(self._seconds) if self._seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Recent tokens over recent seconds; None before the first step."""
        total = sum(self._seconds)
        return sum(self._tokens) / total if total > 0 else None

    def eta_seconds(self, remaining_steps: int) -> float | None:
        """Return the seconds that `remaining_steps` will take at the recent pace; None before the first step."""
        mean = self.mean_seconds
        return None if mean is None else mean * remaining_steps


def throughput(tokens: int, seconds: float, flops_per_token: float, peak_flops: float | None) -> dict[str, float]:
    """Return the throughput metrics of one step.

    Units: `tokens` over all ranks; `flops_per_token` forward and backward of the model's own arithmetic; `peak_flops`
        FLOP/s of all devices together, or None where no peak is known, and then there is no MFU.
    Reference: model FLOPs utilisation, PaLM (arXiv 2204.02311), appendix B.
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
