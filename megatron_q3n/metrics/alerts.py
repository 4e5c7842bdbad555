"""Alerts on metrics: one rule per kind, each with a threshold in the configuration section `alerts`.

A rule either compares a value with a fixed level or detects growth over a window of steps. Alerts are a function of the
records alone: a resumed run restores its state by reading metrics.jsonl again, and the report recomputes the alerts of
the run. Alerts only notify; skipping steps and rolling back are done by `megatron_q3n/health`.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_q3n.config import ModelConfig
from megatron_q3n.config.instruments import AlertsConfig
from megatron_q3n.metrics.jsonl import Record
from megatron_q3n.metrics.names import STEP

# previous losses that a new loss is compared with
WINDOW_STEPS = 100
# losses needed before a spike can be detected
MIN_WINDOW_STEPS = 20
# consecutive steps with dead experts before an alert
DEAD_STEPS = 20
# interquartile range over standard deviation of a normal distribution
QUARTILES_PER_DEVIATION = 1.349


@dataclass(frozen=True)
class Alert:
    """One alert: its step, its kind, and a message that names the value and the setting."""

    step: int
    kind: str
    message: str


class AlertDetector:
    """Applies the alert rules to the records of one run, in order."""

    def __init__(self, settings: AlertsConfig, num_experts: int) -> None:
        """Create a detector; `num_experts` counts the experts of all layers, MTP included."""
        self._settings, self._num_experts = settings, num_experts
        self._recent: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._sorted: list[float] = []
        self._last: dict[str, int] = {}
        self._past: dict[str, deque[tuple[int, float]]] = {}
        self._dead_in_a_row = 0

    def update(self, step: int, values: Mapping[str, float]) -> list[Alert]:
        """Process the next record and return its alerts; a kind is not repeated within `alerts.pause_steps`."""
        alerts = []
        for kind, message in self._triggered(step, values):
            last = self._last.get(kind)
            if last is None or step - last > self._settings.pause_steps:
                self._last[kind] = step
                alerts.append(Alert(step, kind, message))
        return alerts

    def _triggered(self, step: int, values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        loss = values.get("loss/train")
        if loss is not None:
            yield from self._spike(loss)
        yield from self._dead_experts(values.get("experts/dead"))
        for kind, name, setting, what in _LEVELS:
            value, level = values.get(name), getattr(self._settings, setting)
            if value is not None and level is not None and value > level:
                yield kind, f"{what} {value:.4g}, above alerts.{setting}={level:g}"
        for kind, name, least, what in _GROWING:
            if (value := values.get(name)) is not None and math.isfinite(value):
                yield from self._growth(step, kind, name, value, least, what)

    def _growth(
        self, step: int, kind: str, name: str, value: float, least: float, what: str
    ) -> Iterator[tuple[str, str]]:
        """Compare with the value `growth_steps` ago, or with the oldest one if it is at least half as old."""
        factor, window = self._settings.growth_factor, self._settings.growth_steps
        past = self._past.setdefault(name, deque())
        while past and past[0][0] < step - window:
            past.popleft()
        if factor is not None and past and step - past[0][0] >= window / 2:
            past_step, past_value = past[0]
            if value > least and value > factor * past_value:
                yield (
                    kind,
                    f"{what} {value:.4g}, {value / past_value:.1f} times the {past_value:.4g} of step {past_step:,} "
                    f"(alerts.growth_factor={factor:g} in {window:,} steps)",
                )
        past.append((step, value))

    def _dead_experts(self, dead: float | None) -> Iterator[tuple[str, str]]:
        """Alert after DEAD_STEPS consecutive steps: an expert may receive no token of one small batch by chance."""
        limit = self._settings.dead_experts_share
        if dead is None or limit is None or dead <= limit * self._num_experts:
            self._dead_in_a_row = 0
            return
        self._dead_in_a_row += 1
        if self._dead_in_a_row >= DEAD_STEPS:
            yield (
                "dead experts",
                f"{dead:,.0f} of {self._num_experts:,} experts received no token of the global batch for "
                f"{self._dead_in_a_row:,} steps in a row (alerts.dead_experts_share={limit:g})",
            )

    def _spike(self, loss: float) -> Iterator[tuple[str, str]]:
        deviations = self._settings.loss_spike_deviations
        if deviations is not None and not math.isfinite(loss):
            yield "loss spike", "the training loss is not finite (alerts.loss_spike_deviations)"
        if not math.isfinite(loss):
            return
        count = len(self._sorted)
        if deviations is not None and count >= MIN_WINDOW_STEPS:
            low, median, high = (self._sorted[count * quarter // 4] for quarter in (1, 2, 3))
            limit = median + deviations * (high - low) / QUARTILES_PER_DEVIATION
            if loss > limit:
                yield (
                    "loss spike",
                    f"training loss {loss:.4f}, above {limit:.4f}; the median of {count} steps is {median:.4f} "
                    f"(alerts.loss_spike_deviations={deviations:g})",
                )
        if len(self._recent) == WINDOW_STEPS:
            del self._sorted[bisect_left(self._sorted, self._recent[0])]
        self._recent.append(loss)
        insort(self._sorted, loss)


# (kind, metric, setting with the level, start of the message)
_LEVELS = (
    ("expert load", "experts/load_imbalance", "expert_load", "tokens of the most loaded expert over its layer's mean:"),
    ("attention sink", "attention/first_token_share_max", "first_token_share", "attention weight on the first token:"),
    ("massive activations", "activations/max_over_median", "activation_over_median", "largest activation over median:"),
    ("norm scale", "norm_scale/max", "norm_scale", "largest norm scale:"),
    ("scoring failures", "reward/failure_share", "scoring_failures_share", "share of responses that were not scored:"),
)
# (kind, metric, value below which growth is ignored, start of the message). These values grow from their initialization
# in every run: first-token attention from uniform, activations from about 5 times the median, norm scales from 1.
_GROWING = (
    ("sink growth", "attention/first_token_share_max", 0.1, "attention weight on the first token:"),
    ("activation growth", "activations/max_over_median", 100.0, "largest activation over median:"),
    ("norm growth", "norm_scale/max", 2.0, "largest norm scale:"),
)


def num_experts(model: Mapping[str, Any]) -> int:
    """Return the number of routed experts of all layers, MTP included, given the `model` section as a plain tree."""
    settings = {**ModelConfig.model_construct().model_dump(), **model}
    mtp_layers = 1 if settings["mtp_use_repeated_layer"] else settings["mtp_num_layers"]
    total: int = settings["num_moe_experts"] * (settings["num_layers"] + mtp_layers)
    return total


def alerts_in(records: Iterable[Record], config: Mapping[str, Any]) -> list[Alert]:
    """Return all alerts of a run, given its configuration as a plain tree, possibly written by an older version."""
    section = config.get("alerts", {})
    settings = {name: section[name] for name in AlertsConfig.model_fields if name in section}
    detector = AlertDetector(AlertsConfig.model_construct(**settings), num_experts(config.get("model", {})))
    return [alert for record in records for alert in detector.update(int(record[STEP]), record)]
