"""What is read of a finished run: "METRIC HOW", e.g. "loss/validation", "norms/max max", "loss/train spikes".

METRIC is a name of megatron_q3n/metrics/names.py, or of what the evaluate stage found:

    recall/accuracy_<L>, recall/loss_<L>    second copy of L random tokens (megatron_q3n/evaluation/recall.py)
    text/loss, text/bits_per_byte           held-out text
    text/loss_from_<T>                      its stretch of positions that begins at T

HOW is last (if nothing is said), first, max, min or median of what was recorded; or spikes, the number of steps whose
loss an alert would call a spike (megatron_q3n/metrics/alerts.py).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_q3n.config import UserError, suggest
from megatron_q3n.config.instruments import AlertsConfig
from megatron_q3n.metrics import names
from megatron_q3n.metrics.alerts import Alerts
from megatron_q3n.metrics.report.run_files import RunFiles
from megatron_q3n.metrics.report.series import pick

HOWS: dict[str, Callable[[Any], Any]] = {
    "last": lambda y: y[-1],
    "first": lambda y: y[0],
    "max": np.max,
    "min": np.min,
    "median": np.median,
}
SPIKES = "spikes"
LOSS = "loss/train"
EVALUATED = re.compile(
    r"recall/(?P<what>accuracy|loss)_(?P<length>\d+)|text/(?P<text>loss|bits_per_byte)(_from_(?P<start>\d+))?"
)
DIVERGED_NATS = 0.5
DIVERGED_STEPS = 20


@dataclass(frozen=True)
class Measure:
    """One number of a run."""

    metric: str
    how: str

    @property
    def is_recorded(self) -> bool:
        """Whether it is of the records of training, and so has a curve."""
        return not EVALUATED.fullmatch(self.metric)

    def of(self, run: RunFiles) -> float | None:
        """Return the number, or None where the run has none."""
        if not self.is_recorded:
            return evaluated(run.evaluation, self.metric)
        if self.how == SPIKES:
            return float(num_spikes(run))
        known = pick(run.records, self.metric).finite
        return float(HOWS[self.how](known)) if len(known) else None


def measure(text: str) -> Measure:
    """Read "METRIC HOW".

    Raises: UserError for a metric that nobody records, or something else than HOW.
    """
    metric, _, how = text.strip().partition(" ")
    how = how.strip() or "last"
    if not EVALUATED.fullmatch(metric) and names.find(metric) is None:
        known = [row.name for row in names.METRICS]
        raise UserError(
            f"{text!r}: {metric} is no metric.{suggest(metric, known)} They are in megatron_q3n/metrics/names.py, and "
            "recall/accuracy_<L>, recall/loss_<L>, text/loss, text/bits_per_byte, text/loss_from_<T>."
        )
    if how == SPIKES and metric != LOSS:
        raise UserError(f"{text!r}: spikes are counted of {LOSS} alone.")
    if how not in (*HOWS, SPIKES):
        raise UserError(f"{text!r}: {how!r} is none of {', '.join((*HOWS, SPIKES))}.")
    if EVALUATED.fullmatch(metric) and how != "last":
        raise UserError(f"{text!r}: {metric} is measured once, at the end; leave {how!r} out.")
    return Measure(metric, how)


def evaluated(found: Any, metric: str) -> float | None:
    """Return a number of evaluation.json, or None where it has none."""
    match = EVALUATED.fullmatch(metric)
    if match is None or not isinstance(found, dict):
        return None
    if match["what"]:
        task = found["tasks"].get(f"repeat {match['length']} tokens", {})
        return task.get(match["what"])
    text = found["sets"].get("validation", {})
    if match["start"]:
        stretches = text.get("by_position", [])
        text = next((s for s in stretches if s["from"] == int(match["start"])), {})
    return text.get(match["text"])


def num_spikes(run: RunFiles) -> int:
    """Count the steps whose training loss stands out from those before, or is not finite."""
    alerts = Alerts(AlertsConfig(pause_steps=0), num_experts=0)
    losses = ((int(r["step"]), {LOSS: r[LOSS]}) for r in run.records if LOSS in r)
    return sum(len(alerts.examine(step, values)) for step, values in losses)


def has_diverged(run: RunFiles) -> bool:
    """Whether the mean loss of the last 20 steps (of a short run: a fifth) is not finite, or half a nat above the
    lowest such mean there was."""
    losses = pick(run.records, LOSS).y
    window = min(DIVERGED_STEPS, len(losses) // 5)
    if window == 0:
        return bool(len(losses)) and not np.isfinite(losses[-1])
    means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    known = means[np.isfinite(means)]
    return not np.isfinite(means[-1]) or bool(means[-1] > known.min() + DIVERGED_NATS)
