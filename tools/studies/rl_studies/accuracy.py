"""Held-out accuracy over time of runs of the tiny model: curves, table, figure and report."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tools.studies.rl_studies.runs import minutes_at, records, sessions

# a run's responses before its first step
HELD_OUT = "samples/held_out_0000000.jsonl"
COLORS = {"rl": "tab:blue", "control": "tab:orange", "sft": "tab:green"}
NAMES = {"rl": "rl-tiny", "control": "rl-tiny, shuffled rewards", "sft": "sft-tiny continued"}
DPI = 120
# (minutes, accuracy)
Curve = list[tuple[float, float]]


def recorded_curve(run_dir: Path) -> Curve:
    """Return the held-out accuracy over time that a run of rl-tiny recorded."""
    run_sessions = sessions(run_dir)
    points = [(r["time"], r["reward/eval_accuracy"]) for r in records(run_dir) if "reward/eval_accuracy" in r]
    return [(0.0, initial_accuracy(run_dir)), *((minutes_at(run_sessions, time), share) for time, share in points)]


def checkpoints(run_dir: Path, count: int) -> dict[Path, float]:
    """Select about `count` of a run's checkpoints, with the last. Returns: the minutes at which each was saved."""
    run_sessions = sessions(run_dir)
    times = {record["step"]: record["time"] for record in records(run_dir)}
    saved = sorted((run_dir / "checkpoints").glob("step_*[0-9]"))
    selected = dict.fromkeys([*saved[:: max(1, len(saved) // count)], saved[-1]])
    return {c: minutes_at(run_sessions, times[int(c.name.removeprefix("step_"))]) for c in selected}


def initial_accuracy(run_dir: Path) -> float:
    """Return a run's held-out accuracy before its first step."""
    scores = [json.loads(line)["score"] for line in (run_dir / HELD_OUT).read_text().splitlines()]
    return float(np.mean([score >= 1 for score in scores]))


def machine(run_dir: Path) -> str:
    """Return the GPU, or the platform, that a run used."""
    environment = json.loads((run_dir / "environment.json").read_text())
    return str(environment["gpu"] or environment["platform"])


def markdown(results: dict[str, Any], figure: str) -> str:
    """Return the study as Markdown: a table of the runs and the figure."""
    heads = ("seed", "run", "accuracy before", "after", "best", "minutes between")
    interrupted = results["interrupted"]
    return "\n".join(
        [
            f"`{results['command']}`, each run on one core ({results['machine']})."
            + (f" Interrupted so far: {', '.join(interrupted)}." if interrupted else ""),
            "",
            f"| {' | '.join(heads)} |",
            "|---|---|---:|---:|---:|---:|",
            *(f"| {' | '.join(row)} |" for row in rows(results["curves"])),
            "",
            f"![held-out accuracy over minutes]({figure})",
            "",
        ]
    )


def rows(curves_by_seed: dict[str, dict[str, Curve]]) -> list[list[str]]:
    """Return for each run: seed, kind, first, last and best accuracy, minutes."""
    return [
        [
            seed,
            NAMES[kind],
            f"{curve[0][1]:.3f}",
            f"{curve[-1][1]:.3f}",
            f"{max(a for _, a in curve):.3f}",
            f"{curve[-1][0]:.1f}",
        ]
        for seed, curves in curves_by_seed.items()
        for kind, curve in curves.items()
    ]


def plot(path: Path, curves_by_seed: dict[str, dict[str, Curve]]) -> None:
    """Write the figure (PNG): every curve, one color for each kind of run."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for kind, name in NAMES.items():
        curves = [curves[kind] for curves in curves_by_seed.values() if kind in curves]
        for number, curve in enumerate(curves):
            label = None if number else name
            axes.plot(*zip(*curve), color=COLORS[kind], label=label, marker=".", alpha=0.8)
    axes.axhline(0.8, color="gray", linestyle=":")
    axes.set(xlabel="minutes", ylabel="held-out accuracy", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=DPI)


def html_report(results: dict[str, Any], figure: Path) -> str:
    """Return the HTML report: the figure, every run's first and last accuracy, and its cost."""
    heads = ["seed", "run", "accuracy before", "accuracy after", "best", "minutes between"]
    costs = [["process", "wall minutes", "CPU minutes, with reward workers"]]
    costs += [[name, f"{c['wall_minutes']:.1f}", f"{c['cpu_minutes']:.1f}"] for name, c in results["costs"].items()]
    parts = ([heads, *rows(results["curves"])], costs)
    tables = "".join(f"<table>{''.join(map(_row, part))}</table>" for part in parts)
    style = "body{font:15px sans-serif;max-width:60em;margin:2em auto}td{padding:2px 12px}img{width:100%}"
    data = base64.b64encode(figure.read_bytes()).decode()
    return (
        f"<!doctype html><meta charset=utf-8><title>RL study</title><style>{style}</style>"
        "<h1>Reinforcement learning of a tiny model</h1><p>Held-out accuracy within a time limit, with controls. "
        f'{results["command"]}</p><img alt="held-out accuracy over minutes" '
        f'src="data:image/png;base64,{data}">{tables}'
    )


def _row(cells: list[str]) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
