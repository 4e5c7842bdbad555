"""Measures of a finished run: "METRIC REDUCTION", e.g. "loss/validation", "norm_scale/max max", "loss/train spikes".

METRIC is a name of megatron_q3n/metrics/names.py, or a result of the evaluate stage:

    recall/accuracy_<L>, recall/loss_<L>    second copy of L random tokens (megatron_q3n/evaluation/copy_recall.py)
    text/loss, text/bits_per_byte           held-out text
    text/loss_from_<T>                      its range of positions that begins at T

REDUCTION is last (the default), first, max, min or median over the recorded values; or spikes, the number of steps
whose loss raises the alert for a loss spike (megatron_q3n/metrics/alerts.py).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_q3n.config import UserError, suggest
from megatron_q3n.config.instruments import AlertsConfig
from megatron_q3n.metrics import names
from megatron_q3n.metrics.alerts import AlertDetector
from megatron_q3n.metrics.report.run_files import RunFiles
from megatron_q3n.metrics.report.series import pick

REDUCTIONS: dict[str, Callable[[Any], Any]] = {
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
    reduction: str

    @property
    def is_recorded(self) -> bool:
        """Return whether the number comes from the records of training, so that it has a curve."""
        return not EVALUATED.fullmatch(self.metric)

    def of(self, run: RunFiles) -> float | None:
        """Return the number, or None if the run has none."""
        if not self.is_recorded:
            return evaluated(run.evaluation, self.metric)
        if self.reduction == SPIKES:
            return float(num_spikes(run))
        values = pick(run.records, self.metric).finite
        return float(REDUCTIONS[self.reduction](values)) if len(values) else None


def measure(text: str) -> Measure:
    """Parse "METRIC REDUCTION".

    Raises: UserError for an unknown metric or reduction.
    """
    metric, _, reduction = text.strip().partition(" ")
    reduction = reduction.strip() or "last"
    if not EVALUATED.fullmatch(metric) and names.find(metric) is None:
        known = [row.name for row in names.METRICS]
        raise UserError(
            f"{text!r}: {metric} is not a metric.{suggest(metric, known)} Metrics are those of "
            "megatron_q3n/metrics/names.py, and recall/accuracy_<L>, recall/loss_<L>, text/loss, text/bits_per_byte, "
            "text/loss_from_<T>."
        )
    if reduction == SPIKES and metric != LOSS:
        raise UserError(f"{text!r}: spikes are counted of {LOSS} only.")
    if reduction not in (*REDUCTIONS, SPIKES):
        raise UserError(f"{text!r}: {reduction!r} is none of {', '.join((*REDUCTIONS, SPIKES))}.")
    if EVALUATED.fullmatch(metric) and reduction != "last":
        raise UserError(f"{text!r}: {metric} is measured once, at the end; omit {reduction!r}.")
    return Measure(metric, reduction)


def evaluated(results: Any, metric: str) -> float | None:
    """Return a number of evaluation.json, or None if it has none."""
    match = EVALUATED.fullmatch(metric)
    if match is None or not isinstance(results, dict):
        return None
    if match["what"]:
        task = results["tasks"].get(f"repeat {match['length']} tokens", {})
        return task.get(match["what"])
    text = results["sets"].get("validation", {})
    if match["start"]:
        ranges = text.get("by_position", [])
        text = next((s for s in ranges if s["from"] == int(match["start"])), {})
    return text.get(match["text"])


def num_spikes(run: RunFiles) -> int:
    """Count the steps whose training loss is a spike, or is not finite."""
    alerts = AlertDetector(AlertsConfig(pause_steps=0), num_experts=0)
    losses = ((int(r["step"]), {LOSS: r[LOSS]}) for r in run.records if LOSS in r)
    return sum(len(alerts.update(step, values)) for step, values in losses)


def has_diverged(run: RunFiles) -> bool:
    """Return whether a run diverged: its last mean loss is not finite, or half a nat above the lowest of its means.

    Means are over 20 steps; in a short run over a fifth of it.
    """
    losses = pick(run.records, LOSS).y
    window = min(DIVERGED_STEPS, len(losses) // 5)
    if window == 0:
        return bool(len(losses)) and not np.isfinite(losses[-1])
    means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    finite = means[np.isfinite(means)]
    return not np.isfinite(means[-1]) or bool(means[-1] > finite.min() + DIVERGED_NATS)
