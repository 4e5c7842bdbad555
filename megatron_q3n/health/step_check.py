"""StepCheck: detection of non-finite steps and loss spikes, before the update. Plain numbers, no torch, no clock.

The result is the same on every rank, because loss and gradient norm are. A spike is measured against median and
quartiles of the recent sound steps; mean and standard deviation would be moved by the very spikes to detect.

Reference: skipping single updates: OLMo 2 (arXiv 2501.00656), section on skipped steps; rolling back and skipping data:
PaLM (arXiv 2204.02311), section 5.1.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_q3n.config.health import HealthConfig

# interquartile range of a normal distribution, in standard deviations
QUARTILES_PER_DEVIATION = 1.349


@dataclass(frozen=True)
class BadStep:
    """A non-finite step or a spike, and the action of the policy."""

    step: int
    kind: Literal["non_finite", "loss_spike"]
    description: str
    action: Literal["skip", "roll_back", "stop"]


class StepCheck:
    """Check of each step's loss and gradient norm against the recent sound steps of a run."""

    def __init__(self, settings: HealthConfig) -> None:
        self._settings = settings
        window = settings.spike_window_steps
        self._losses: deque[float] = deque(maxlen=window)
        self._grad_norms: deque[float] = deque(maxlen=window)
        self._consecutive = 0

    def set_history(self, steps: Iterable[tuple[float, float]]) -> None:
        """Replace the history by (loss, gradient norm) of steps of an earlier process; non-finite ones are dropped."""
        self._losses.clear()
        self._grad_norms.clear()
        for loss, grad_norm in steps:
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self._losses.append(loss)
                self._grad_norms.append(grad_norm)

    def check(self, step: int, loss: float, grad_norm: float) -> BadStep | None:
        """Check one step before its update. A sound step enters the history.

        Returns: the bad step with the action to take, or None for a sound step.
        """
        policy, bad_step = self._settings, None
        values = f"loss {loss:.4f}, gradient norm {grad_norm:.4g}"
        if not (math.isfinite(grad_norm) and math.isfinite(loss)):
            bad_step = self._bad_step(step, "non_finite", f"{values}, not finite", policy.non_finite)
        elif policy.loss_spike != "ignore" and (spike := self._spike(loss, grad_norm)):
            bad_step = self._bad_step(step, "loss_spike", f"{values}, {spike}", policy.loss_spike)
        if bad_step is None:
            self._consecutive = 0
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)
        return bad_step

    def _bad_step(self, step: int, kind: str, description: str, action: str) -> BadStep:
        self._consecutive += 1
        if self._consecutive >= self._settings.max_consecutive_bad_steps and action != "stop":
            description = f"{description}, {self._consecutive} bad steps in a row (health.max_consecutive_bad_steps)"
            action = "stop"
        return BadStep(step, kind, description, action)  # type: ignore[arg-type]

    def _spike(self, loss: float, grad_norm: float) -> str | None:
        """Return how far a step is above the history, or None if it is no spike."""
        if len(self._losses) < self._settings.spike_min_steps:
            return None
        series = (("loss", loss, self._losses), ("gradient norm", grad_norm, self._grad_norms))
        for name, value, history in series:
            low, median, high = statistics.quantiles(history, n=4)
            deviation = (high - low) / QUARTILES_PER_DEVIATION
            limit = median + self._settings.spike_deviations * deviation
            if value > limit:
                return f"{name} above {limit:.4g} (median {median:.4g} of {len(history)} steps)"
        return None
