"""Figure of a study: a panel per compared metric, with a thin line per run and a thick one per variant's mean.

A further panel shows recall by length. The figure is separate from the HTML report, because docs/evidence.md is
Markdown and shows image files.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_q3n.metrics import names
from megatron_q3n.metrics.report.run_files import RunFiles
from megatron_q3n.metrics.report.series import pick, smooth
from tools.studies.ablations.measures import EVALUATED, Measure

COLUMNS, PANEL_INCHES, DPI = 3, (4.2, 2.9), 100
# numbers of points
SMOOTHED_ABOVE, MARKED_BELOW = 100, 12
# groups of metrics about the machine, not the model
MACHINE_GROUPS = ("throughput", "memory")
# ratio of largest to smallest value above which the axis is logarithmic
LOG_ABOVE = 50.0
RECALL = re.compile(r"repeat (\d+) tokens")
# variant -> runs
Runs = dict[str, list[RunFiles]]


def draw(path: Path, title: str, measures: Sequence[Measure], runs: Runs) -> None:
    """Write the figure as PNG."""
    metrics = [m for m in dict.fromkeys(m.metric for m in measures) if _is_drawn(m)]
    has_recall = any((EVALUATED.fullmatch(m.metric) or {"what": None})["what"] for m in measures)
    count = len(metrics) + has_recall
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, metric in zip(panels, metrics):
        _curves(axes, metric, runs)
    if has_recall:
        _recall(panels[len(metrics)], runs)
    for axes in panels[count:]:
        axes.set_visible(False)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=DPI)


def _is_drawn(metric: str) -> bool:
    # None: a single result of the evaluate stage
    row = names.find(metric)
    return row is not None and row.group not in MACHINE_GROUPS


def _curves(axes: Axes, metric: str, runs: Runs) -> None:
    values = []
    for number, (variant, every) in enumerate(runs.items()):
        series = [pick(run.records, metric) for run in every]
        series = [smooth(s) if len(s) > SMOOTHED_ABOVE else s for s in series]
        values += [s.finite for s in series]
        has_mean = len(series) > 1 and all(np.array_equal(s.x, series[0].x) for s in series)
        for s in series:
            marker = "." if len(s) < MARKED_BELOW else None
            axes.plot(s.x, s.y, color=f"C{number}", linewidth=0.7 if has_mean else 1.6, marker=marker)
        if has_mean:
            mean = np.mean([s.y for s in series], axis=0)
            axes.plot(series[0].x, mean, color=f"C{number}")
        axes.plot([], [], color=f"C{number}", label=variant)
    all_values = np.concatenate(values) if values else np.zeros(0)
    if len(all_values) and all_values.min() > 0 and all_values.max() / all_values.min() > LOG_ABOVE:
        axes.set_yscale("log")
    axes.set_title(metric, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.grid(alpha=0.3)


def _recall(axes: Axes, runs: Runs) -> None:
    for number, (variant, every) in enumerate(runs.items()):
        for run in every:
            points = sorted(_accuracies(run.evaluation))
            if points:
                axes.plot(*zip(*points), color=f"C{number}", marker=".", label=variant)
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.02, 1.02)
    axes.set_title("recall: accuracy by length in tokens", fontsize=9)
    axes.grid(alpha=0.3)


def _accuracies(results: Any) -> list[tuple[int, float]]:
    tasks = results["tasks"] if isinstance(results, dict) else {}
    named = ((RECALL.fullmatch(name), scores) for name, scores in tasks.items())
    return [(int(match[1]), scores["accuracy"]) for match, scores in named if match]
