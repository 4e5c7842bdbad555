"""Cards of the copy recall probe (evaluation/copy_recall.py): accuracy by copy length, of one run or of variants."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_q3n.metrics.report import page
from megatron_q3n.metrics.report.charts import Curve, line_chart
from megatron_q3n.metrics.report.series import Series
from megatron_q3n.metrics.report.variants import Variant, mean_curve

TASK = re.compile(r"repeat (?P<length>\d+) tokens(?: of (?P<of>.+))?")
TITLE = "Copy recall (induction)"
NOTE = "Random tokens followed by the same tokens again: accuracy on the second copy, by copy length."
Scores = dict[str, float]


def is_recall(task: str) -> bool:
    """Return whether a task of evaluation.json is a copy length of the probe."""
    return TASK.fullmatch(task) is not None


def recall_scores(evaluation: Any) -> dict[str, dict[int, Scores]]:
    """Return the scores by data set ("" if there is only one) and copy length; empty without the probe."""
    tasks = evaluation.get("tasks", {}) if isinstance(evaluation, dict) else {}
    sets: dict[str, dict[int, Scores]] = {}
    for task, scores in tasks.items():
        if match := TASK.fullmatch(task):
            sets.setdefault(match["of"] or "", {})[int(match["length"])] = scores
    return {name: dict(sorted(scores.items())) for name, scores in sets.items()}


def recall_cards(evaluation: Any) -> Iterator[str]:
    """Yield the card of each data set: a chart of accuracy over length, and a table."""
    for name, scores in recall_scores(evaluation).items():
        rows = [
            (f"{length:,}", f"{s['accuracy']:.1%}", f"{s['loss']:.3f}", f"{s['loss of the first copy']:.3f}")
            for length, s in scores.items()
        ]
        table = page.table(rows, ("tokens", "accuracy", "loss, nats/token", "loss of the first copy"))
        title = f"{TITLE}: {name}" if name else TITLE
        curve = Curve(_accuracy(scores), "accuracy", "c0", markers=True)
        yield page.card(title, _chart([curve], title) + table, note=NOTE)


def recall_comparison(variants: Sequence[Variant]) -> Iterator[str]:
    """Yield a card for each data set: a thin curve per run, a thick curve for the variant's mean."""
    all_scores = [recall_scores(run.evaluation) for variant in variants for run in variant.runs]
    for name in dict.fromkeys(name for scores in all_scores for name in scores):
        curves: list[Curve] = []
        for variant in variants:
            scores_by_run = [recall_scores(run.evaluation) for run in variant.runs]
            runs = [_accuracy(scores[name]) for scores in scores_by_run if name in scores]
            mean = mean_curve(runs)
            curves += [Curve(series, "accuracy", variant.color, mean is not None, mean is None) for series in runs]
            curves += [] if mean is None else [Curve(mean, "accuracy", variant.color, markers=True)]
        title = f"{TITLE}: {name}" if name else TITLE
        keys = [(variant.name, variant.color, "") for variant in variants]
        yield page.card(title, _chart(curves, title), legend=keys, note=NOTE)


def _accuracy(scores: dict[int, Scores]) -> Series:
    return Series(np.array([*scores], float), np.array([s["accuracy"] for s in scores.values()]))


def _chart(curves: Sequence[Curve], title: str) -> str:
    return line_chart(curves, title=title, x_label="copy length, tokens", log2_x=True, unit_interval=True)
