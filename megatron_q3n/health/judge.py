"""Is this step sound? Numbers in, a verdict out: no torch, no clock, the same answer on every rank.

A spike is judged by the median and the quartiles of the recent sound steps: a mean and a standard deviation would be
moved by the very spikes they should find. Reference for skipping single updates so: OLMo 2 (arXiv 2501.00656), section
on skipped steps; for going back and leaving data out: PaLM (arXiv 2204.02311), section 5.1.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_q3n.config.health import HealthConfig

# of a normal distribution: quartile distance over standard deviation
QUARTILES_PER_DEVIATION = 1.349


@dataclass(frozen=True)
class Trouble:
    """A step that is not sound, and what policy says to do."""

    step: int
    kind: Literal["non_finite", "loss_spike"]
    what: str
    action: Literal["skip", "roll_back", "stop"]


class Judge:
    """Remembers the sound steps of a run and holds each new one against them."""

    def __init__(self, settings: HealthConfig) -> None:
        self._settings = settings
        window = settings.spike_window_steps
        self._losses: deque[float] = deque(maxlen=window)
        self._norms: deque[float] = deque(maxlen=window)
        self._in_a_row = 0

    def remember(self, steps: Iterable[tuple[float, float]]) -> None:
        """Begin anew with (loss, gradient norm) of steps an earlier process took; unsound ones are passed over."""
        self._losses.clear()
        self._norms.clear()
        for loss, norm in steps:
            if math.isfinite(loss) and math.isfinite(norm):
                self._losses.append(loss)
                self._norms.append(norm)

    def examine(self, step: int, loss: float, norm: float) -> Trouble | None:
        """Judge one step before its update.

        Returns: the trouble with the action to take, or None for a sound step.
        """
        policy, trouble = self._settings, None
        reading = f"loss {loss:.4f}, gradient norm {norm:.4g}"
        if not (math.isfinite(norm) and math.isfinite(loss)):
            trouble = self._trouble(step, "non_finite", f"{reading}, not finite", policy.non_finite)
        elif policy.loss_spike != "ignore" and (above := self._spike(loss, norm)):
            trouble = self._trouble(step, "loss_spike", f"{reading}, {above}", policy.loss_spike)
        if trouble is None:
            self._in_a_row = 0
            self._losses.append(loss)
            self._norms.append(norm)
        return trouble

    def _trouble(self, step: int, kind: str, what: str, action: str) -> Trouble:
        self._in_a_row += 1
        if self._in_a_row >= self._settings.max_troubles_in_a_row and action != "stop":
            what = f"{what}, {self._in_a_row} bad steps in a row (health.max_troubles_in_a_row)"
            action = "stop"
        return Trouble(step, kind, what, action)  # type: ignore[arg-type]

    def _spike(self, loss: float, norm: float) -> str | None:
        """Say how a step stands out, or None."""
        if len(self._losses) < self._settings.spike_minimum_steps:
            return None
        readings = (("loss", loss, self._losses), ("gradient norm", norm, self._norms))
        for name, value, window in readings:
            low, median, high = statistics.quantiles(window, n=4)
            deviation = (high - low) / QUARTILES_PER_DEVIATION
            limit = median + self._settings.spike_deviations * deviation
            if value > limit:
                return f"{name} above {limit:.4g} (median {median:.4g} of {len(window)} steps)"
        return None
