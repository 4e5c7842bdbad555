"""What a model recalled (evaluation/recall.py), by how many tokens it had to: one run, or variants side by side."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_q3n.metrics.report import page
from megatron_q3n.metrics.report.charts import Curve, line_chart
from megatron_q3n.metrics.report.series import Series
from megatron_q3n.metrics.report.variants import Variant, mean_curve

TASK = re.compile(r"repeat (?P<length>\d+) tokens(?: of (?P<of>.+))?")
TITLE = "Recall"
NOTE = "So many random tokens, then the same again: the share of the second copy that is predicted right."
Scores = dict[str, float]


def is_recall(task: str) -> bool:
    """Whether a task of evaluation.json is a length of the recall probe."""
    return TASK.fullmatch(task) is not None


def recalled(found: Any) -> dict[str, dict[int, Scores]]:
    """Return the scores by length, of each data set ("" where there is one); empty without the probe."""
    tasks = found.get("tasks", {}) if isinstance(found, dict) else {}
    sets: dict[str, dict[int, Scores]] = {}
    for task, scores in tasks.items():
        if match := TASK.fullmatch(task):
            sets.setdefault(match["of"] or "", {})[int(match["length"])] = scores
    return {name: dict(sorted(scores.items())) for name, scores in sets.items()}


def recall_cards(found: Any) -> Iterator[str]:
    """Yield the card of each data set: accuracy over length, and the numbers."""
    for name, scores in recalled(found).items():
        rows = [
            (f"{length:,}", f"{s['accuracy']:.1%}", f"{s['loss']:.3f}", f"{s['loss of the first copy']:.3f}")
            for length, s in scores.items()
        ]
        numbers = page.table(rows, ("tokens", "right", "nats/token", "of the first copy"))
        title = f"{TITLE}: {name}" if name else TITLE
        curve = Curve(_accuracy(scores), "right", "c0", markers=True)
        yield page.card(title, _chart([curve], title) + numbers, note=NOTE)


def recall_comparison(variants: Sequence[Variant]) -> Iterator[str]:
    """Yield a card for each data set: thin a run each, thick a variant's mean."""
    every = [recalled(run.evaluation) for variant in variants for run in variant.runs]
    for name in dict.fromkeys(name for sets in every for name in sets):
        curves: list[Curve] = []
        for variant in variants:
            sets = [recalled(run.evaluation) for run in variant.runs]
            runs = [_accuracy(found[name]) for found in sets if name in found]
            mean = mean_curve(runs)
            curves += [Curve(series, "right", variant.colour, mean is not None, mean is None) for series in runs]
            curves += [] if mean is None else [Curve(mean, "right", variant.colour, markers=True)]
        title = f"{TITLE}: {name}" if name else TITLE
        keys = [(variant.name, variant.colour, "") for variant in variants]
        yield page.card(title, _chart(curves, title), legend=keys, note=NOTE)


def _accuracy(scores: dict[int, Scores]) -> Series:
    return Series(np.array([*scores], float), np.array([s["accuracy"] for s in scores.values()]))


def _chart(curves: Sequence[Curve], title: str) -> str:
    return line_chart(curves, title=title, x_label="tokens to recall", doubling_x=True, is_share=True)
