"""Rewards and training–rollout mismatch of several reinforcement learning runs: tables and a figure.

Everything is read from their metrics. Routing mismatch is the share of tokens whose experts differ from the rollout's:
by the trainer's own top-k (mean over layers), and of the experts used, which with replay are the rollout's.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_q3n.metrics.report.series import Series, smooth

COLUMNS, PANEL_INCHES, DPI = 3, (4.2, 2.9), 100
# curves with more points are smoothed
SMOOTHED_ABOVE_POINTS = 60
ROUTING_MISMATCH = re.compile(r"train_rollout/routing_mismatch_layer_\d+")
Record = dict[str, Any]
# by variant
Runs = dict[str, list[Record]]


def mean_routing_mismatch(record: Record) -> float | None:
    """Return the share of tokens for which the trainer's top-k selects other experts, mean over layers."""
    shares = [value for name, value in record.items() if ROUTING_MISMATCH.fullmatch(name)]
    return float(np.mean(shares)) if shares else None


def max_routing_mismatch(record: Record) -> float | None:
    """Return that share in the layer where it is largest."""
    shares = [value for name, value in record.items() if ROUTING_MISMATCH.fullmatch(name)]
    return max(shares) if shares else None


def metric(name: str) -> Callable[[Record], float | None]:
    """Return a function that reads one metric of a record."""
    return lambda record: record.get(name)


PANELS: dict[str, Callable[[Record], float | None]] = {
    "accuracy on held-out words": metric("reward/eval_accuracy"),
    "share of correct responses in the rollout": metric("reward/solved"),
    "entropy, nats per token": metric("rl/entropy"),
    "|logprob difference| rollout, trainer (nats)": metric("train_rollout/logprob_diff_mean"),
    "KL rollout, trainer (nats per token)": metric("train_rollout/kl"),
    "routing mismatch (own top-k, mean over layers)": mean_routing_mismatch,
    "routing mismatch after replay (worst layer)": metric("train_rollout/routing_mismatch_after_replay"),
    "share of clipped tokens": metric("rl/clip_fraction"),
    "gradient norm": metric("grad_norm"),
}
LOGARITHMIC = ("logprob", "KL", "gradient")
FIRST_ROLLOUT = {
    "mean abs. logprob difference": metric("train_rollout/logprob_diff_mean"),
    "largest": metric("train_rollout/logprob_diff_max"),
    "KL": metric("train_rollout/kl"),
    "routing mismatch, mean over layers": mean_routing_mismatch,
    "worst layer": max_routing_mismatch,
    "after replay, worst layer": metric("train_rollout/routing_mismatch_after_replay"),
}


def first_rollout(rows: list[Record]) -> dict[str, float | None]:
    """Return the mismatch of the first rollout, which has the same weights and prompts in every variant."""
    return {name: read(rows[0]) for name, read in FIRST_ROLLOUT.items()}


def whole_run(rows: list[Record], initial_accuracy: float) -> dict[str, float | None]:
    """Return the summary of a run: accuracies, and means and extremes over its steps."""
    held_out = values(rows, metric("reward/eval_accuracy"))
    difference = values(rows, metric("train_rollout/logprob_diff_mean"))
    own_topk, after_replay = (
        values(rows, mean_routing_mismatch),
        values(rows, metric("train_rollout/routing_mismatch_after_replay")),
    )
    return {
        "steps": float(rows[-1]["step"]),
        "accuracy before": initial_accuracy,
        "after": held_out[-1] if held_out else None,
        "best": max(held_out, default=None),
        "mean abs. logprob difference": float(np.mean(difference)),
        "at its largest": max(difference),
        "routing mismatch": float(np.mean(own_topk)) if own_topk else None,
        "largest after replay": max(after_replay, default=None),
        "clip fraction": float(np.mean(values(rows, metric("rl/clip_fraction")))),
        "largest gradient norm": max(values(rows, metric("grad_norm"))),
    }


def values(rows: list[Record], read: Callable[[Record], float | None]) -> list[float]:
    """Return the values of all records that have it."""
    return [value for row in rows if (value := read(row)) is not None]


def markdown(results: dict[str, Any], figure: str) -> str:
    """Return the study as Markdown: two tables and the figure."""
    unfinished = [name for name, ended in results["has_ended"].items() if not ended]
    remark = f" Interrupted so far: {', '.join(unfinished)}." if unfinished else ""
    minutes = max(cost["wall_minutes"] for cost in results["cost"].values())
    return "\n".join(
        [
            f"`{results['command']}` on {results['machine']}; {results['sft']['steps']:.0f} steps of fine-tuning, then "
            f"up to {minutes:.1f} minutes per run, all in parallel.{remark}",
            "",
            "The first rollout, identical in every run:",
            "",
            *_table(results["first_rollout"]),
            "",
            "The runs:",
            "",
            *_table(results["whole_run"]),
            "",
            f"![reward and mismatch over steps]({figure})",
            "",
        ]
    )


def plot(path: Path, runs: Runs, initial_accuracies: dict[str, float]) -> None:
    """Write the figure (PNG): a panel for each metric over the steps, a color for each run."""
    rows = -(-len(PANELS) // COLUMNS)
    size = (PANEL_INCHES[0] * COLUMNS, PANEL_INCHES[1] * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for number, (axes, (title, read)) in enumerate(zip(panels, PANELS.items())):
        for color, (name, records) in enumerate(runs.items()):
            points = [(r["step"], value) for r in records if (value := read(r)) is not None]
            if number == 0:
                points = [(0, initial_accuracies[name]), *points]
            _curve(axes, points, name, f"C{color}")
        if any(word in title for word in LOGARITHMIC):
            axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("update", fontsize=8)
        axes.grid(alpha=0.3)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=DPI)


def _curve(axes: Axes, points: list[tuple[int, float]], name: str, color: str) -> None:
    series = Series(*np.asarray(points, dtype=np.float64).reshape(-1, 2).T)
    if len(series) > SMOOTHED_ABOVE_POINTS:
        axes.plot(series.x, series.y, color=color, linewidth=0.5, alpha=0.4)
        series = smooth(series)
    axes.plot(series.x, series.y, color=color, label=name, linewidth=1.4)


def _table(rows: dict[str, dict[str, float | None]]) -> list[str]:
    heads = list(next(iter(rows.values())))
    return [
        f"| run | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(heads)}",
        *(f"| {name} | {' | '.join(_number(row[head]) for head in heads)} |" for name, row in rows.items()),
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
