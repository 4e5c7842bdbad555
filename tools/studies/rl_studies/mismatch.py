"""What runs of reinforcement learning recorded of reward and of the mismatch of rollout and trainer, side by side.

Everything is read of their metrics. Routes are given as the mean over layers of the share of tokens whose experts
differ: those the trainer would choose, and those it used, which with replay are the rollout's.
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
SMOOTHED_ABOVE = 60  # points
ROUTES = re.compile(r"mismatch/routes_\d+")
Record = dict[str, Any]
Runs = dict[str, list[Record]]  # of a variant


def routes_chosen(record: Record) -> float | None:
    """Return the share of tokens whose experts the trainer would choose otherwise, a mean over layers."""
    shares = [value for name, value in record.items() if ROUTES.fullmatch(name)]
    return float(np.mean(shares)) if shares else None


def routes_most(record: Record) -> float | None:
    """Return the same of the layer where it is largest."""
    shares = [value for name, value in record.items() if ROUTES.fullmatch(name)]
    return max(shares) if shares else None


def metric(name: str) -> Callable[[Record], float | None]:
    """Return what reads one recorded number."""
    return lambda record: record.get(name)


PANELS: dict[str, Callable[[Record], float | None]] = {
    "accuracy on held-out words": metric("reward/held_out"),
    "share of right answers in the rollout": metric("reward/full_marks"),
    "entropy, nats a token": metric("rl/entropy"),
    "|logprob difference| rollout, trainer (nats)": metric("mismatch/logprob_mean"),
    "KL rollout, trainer (nats a token)": metric("mismatch/kl"),
    "routes the trainer would choose otherwise": routes_chosen,
    "routes it used otherwise (worst layer)": metric("mismatch/routes_used"),
    "share of clipped tokens": metric("rl/clipped"),
    "gradient norm": metric("grad_norm"),
}
LOGARITHMIC = ("logprob", "KL", "gradient")
FIRST = {
    "mean abs. logprob difference": metric("mismatch/logprob_mean"),
    "largest": metric("mismatch/logprob_max"),
    "KL": metric("mismatch/kl"),
    "routes chosen otherwise, mean over layers": routes_chosen,
    "in the worst layer": routes_most,
    "routes used otherwise, worst layer": metric("mismatch/routes_used"),
}


def first(rows: list[Record]) -> dict[str, float | None]:
    """Return the mismatch of the first rollout, which has the same weights and prompts in every variant."""
    return {name: read(rows[0]) for name, read in FIRST.items()}


def whole(rows: list[Record], before: float) -> dict[str, float | None]:
    """Return what became of a run: accuracies, and means and extremes over its steps."""
    held_out = values(rows, metric("reward/held_out"))
    difference = values(rows, metric("mismatch/logprob_mean"))
    chosen, used = values(rows, routes_chosen), values(rows, metric("mismatch/routes_used"))
    return {
        "steps": float(rows[-1]["step"]),
        "accuracy before": before,
        "after": held_out[-1] if held_out else None,
        "best": max(held_out, default=None),
        "mean abs. logprob difference": float(np.mean(difference)),
        "at its largest": max(difference),
        "routes chosen otherwise": float(np.mean(chosen)) if chosen else None,
        "routes used otherwise, at most": max(used, default=None),
        "clipped": float(np.mean(values(rows, metric("rl/clipped")))),
        "largest gradient norm": max(values(rows, metric("grad_norm"))),
    }


def values(rows: list[Record], read: Callable[[Record], float | None]) -> list[float]:
    """Return what the records that hold it say."""
    return [value for row in rows if (value := read(row)) is not None]


def markdown(found: dict[str, Any], picture: str) -> str:
    """Return the study as Markdown: two tables and the picture."""
    unfinished = [name for name, ended in found["has_ended"].items() if not ended]
    remark = f" Interrupted so far: {', '.join(unfinished)}." if unfinished else ""
    minutes = max(cost["wall_minutes"] for cost in found["cost"].values())
    return "\n".join(
        [
            f"`{found['command']}` on {found['machine']}; {found['sft']['steps']:.0f} steps of fine-tuning, then up to "
            f"{minutes:.1f} minutes a run, all at once.{remark}",
            "",
            "The first rollout, the same answers in every run:",
            "",
            *_table(found["first_rollout"]),
            "",
            "The runs:",
            "",
            *_table(found["whole_run"]),
            "",
            f"![reward and mismatch over steps]({picture})",
            "",
        ]
    )


def draw(path: Path, runs: Runs, before: dict[str, float]) -> None:
    """Write the picture (PNG): a panel for each quantity over the steps, a colour for each run."""
    rows = -(-len(PANELS) // COLUMNS)
    size = (PANEL_INCHES[0] * COLUMNS, PANEL_INCHES[1] * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for number, (axes, (title, read)) in enumerate(zip(panels, PANELS.items())):
        for colour, (name, records) in enumerate(runs.items()):
            points = [(r["step"], value) for r in records if (value := read(r)) is not None]
            if number == 0:
                points = [(0, before[name]), *points]
            _curve(axes, points, name, f"C{colour}")
        if any(word in title for word in LOGARITHMIC):
            axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("update", fontsize=8)
        axes.grid(alpha=0.3)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=DPI)


def _curve(axes: Axes, points: list[tuple[int, float]], name: str, colour: str) -> None:
    series = Series(*np.asarray(points, dtype=np.float64).reshape(-1, 2).T)
    if len(series) > SMOOTHED_ABOVE:
        axes.plot(series.x, series.y, color=colour, linewidth=0.5, alpha=0.4)
        series = smooth(series)
    axes.plot(series.x, series.y, color=colour, label=name, linewidth=1.4)


def _table(rows: dict[str, dict[str, float | None]]) -> list[str]:
    heads = list(next(iter(rows.values())))
    return [
        f"| run | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(heads)}",
        *(f"| {name} | {' | '.join(_number(row[head]) for head in heads)} |" for name, row in rows.items()),
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
