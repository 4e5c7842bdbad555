"""Which of a run's numbers are worth telling somebody: a rule per kind, each with its level in the configuration.

Levels say that something is bad, growth that it is getting so. An alert depends on the records alone. So a resumed run
goes on where it was by reading them again, and the report finds the very alerts the run gave. It is never a verdict:
whether a bad step is taken is health's affair.
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

WINDOW_STEPS = 100  # of losses that a new one is compared with
MINIMUM_STEPS = 20  # before a spike is seen
DEAD_STEPS = 20  # in a row
# of a normal distribution: quartile distance over standard deviation
QUARTILES_PER_DEVIATION = 1.349


@dataclass(frozen=True)
class Alert:
    """What happened, at which step, and the setting that decides about it."""

    step: int
    kind: str
    message: str


class Alerts:
    """Watches the records of one run, in order."""

    def __init__(self, settings: AlertsConfig, num_experts: int) -> None:
        """Hold numbers against `settings`; `num_experts` counts those of all layers, MTP's too."""
        self._settings, self._num_experts = settings, num_experts
        self._recent: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._sorted: list[float] = []
        self._last: dict[str, int] = {}
        self._past: dict[str, deque[tuple[int, float]]] = {}
        self._dead_in_a_row = 0

    def examine(self, step: int, values: Mapping[str, float]) -> list[Alert]:
        """Take in the next record; return its alerts, without those of a kind that spoke a short while ago."""
        fresh = []
        for kind, message in self._found(step, values):
            last = self._last.get(kind)
            if last is None or step - last > self._settings.pause_steps:
                self._last[kind] = step
                fresh.append(Alert(step, kind, message))
        return fresh

    def _found(self, step: int, values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
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
        """Compare with what was measured `growth_steps` ago, or a little less; a young run waits for half of that."""
        factor, window = self._settings.growth_factor, self._settings.growth_steps
        past = self._past.setdefault(name, deque())
        while past and past[0][0] < step - window:
            past.popleft()
        if factor is not None and past and step - past[0][0] >= window / 2:
            before, then = past[0]
            if value > least and value > factor * then:
                yield (
                    kind,
                    f"{what} {value:.4g}, {value / then:.1f} times the {then:.4g} of step {before:,} "
                    f"(alerts.growth_factor={factor:g} in {window:,} steps)",
                )
        past.append((step, value))

    def _dead_experts(self, dead: float | None) -> Iterator[tuple[str, str]]:
        """Experts that miss one small batch are not dead yet."""
        limit = self._settings.dead_experts_share
        if dead is None or limit is None or dead <= limit * self._num_experts:
            self._dead_in_a_row = 0
            return
        self._dead_in_a_row += 1
        if self._dead_in_a_row >= DEAD_STEPS:
            yield (
                "dead experts",
                f"{dead:,.0f} of {self._num_experts:,} experts had no token in the global batch for "
                f"{self._dead_in_a_row:,} steps in a row (alerts.dead_experts_share={limit:g})",
            )

    def _spike(self, loss: float) -> Iterator[tuple[str, str]]:
        deviations = self._settings.loss_spike_deviations
        if deviations is not None and not math.isfinite(loss):
            yield "loss spike", "the training loss is not finite (alerts.loss_spike_deviations)"
        if not math.isfinite(loss):
            return
        count = len(self._sorted)
        if deviations is not None and count >= MINIMUM_STEPS:
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


# (kind, metric, setting that holds its level, how the message begins)
_LEVELS = (
    ("expert load", "experts/max_over_mean", "expert_load", "fullest expert over its layer's mean:"),
    ("attention sink", "sinks/first_token_max", "first_token_share", "share of attention on the first token:"),
    ("massive activations", "activations/max_over_median", "activation_over_median", "largest activation over median:"),
    ("norm scale", "norms/max", "norm_scale", "largest scale of a norm:"),
)
# (kind, metric, below which it may grow as it likes, how the message begins). Every run grows out of its init: sinks
# from an even spread, activations from a normal distribution's 5 over its median, norms from 1.
_GROWING = (
    ("sink growth", "sinks/first_token_max", 0.1, "share of attention on the first token:"),
    ("activation growth", "activations/max_over_median", 100.0, "largest activation over median:"),
    ("norm growth", "norms/max", 2.0, "largest scale of a norm:"),
)


def num_experts(model: Mapping[str, Any]) -> int:
    """Return how many experts have a router before them, given the model section as a plain tree."""
    every = {**ModelConfig.model_construct().model_dump(), **model}
    mtp_layers = 1 if every["mtp_use_repeated_layer"] else every["mtp_num_layers"]
    total: int = every["num_moe_experts"] * (every["num_layers"] + mtp_layers)
    return total


def alerts_in(records: Iterable[Record], config: Mapping[str, Any]) -> list[Alert]:
    """Return every alert of a run, given its configuration as a plain tree, of an older version perhaps."""
    chosen = config.get("alerts", {})
    known = {name: chosen[name] for name in AlertsConfig.model_fields if name in chosen}
    alerts = Alerts(AlertsConfig.model_construct(**known), num_experts(config.get("model", {})))
    return [alert for record in records for alert in alerts.examine(int(record[STEP]), record)]
