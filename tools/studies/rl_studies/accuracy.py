"""Held-out accuracy over time of runs of the tiny model: curves, the table, the picture and the report."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tools.studies.rl_studies.runs import minutes_at, records, sessions

HELD_OUT = "samples/held_out_0000000.jsonl"  # a run's answers before its first step
COLOURS = {"rl": "tab:blue", "control": "tab:orange", "sft": "tab:green"}
NAMES = {"rl": "rl-tiny", "control": "rl-tiny, shuffled rewards", "sft": "sft-tiny continued"}
DPI = 120
Curve = list[tuple[float, float]]  # (minutes, accuracy)


def measured(run_dir: Path) -> Curve:
    """Return the held-out accuracy that a run of rl-tiny measured itself."""
    known = sessions(run_dir)
    points = [(r["time"], r["reward/held_out"]) for r in records(run_dir) if "reward/held_out" in r]
    return [(0.0, before(run_dir)), *((minutes_at(known, time), share) for time, share in points)]


def checkpoints(run_dir: Path, count: int) -> dict[Path, float]:
    """Choose about so many of a run's checkpoints. Returns: after how many minutes each was left, the last one too."""
    known = sessions(run_dir)
    times = {record["step"]: record["time"] for record in records(run_dir)}
    saved = sorted((run_dir / "checkpoints").glob("step_*[0-9]"))
    chosen = dict.fromkeys([*saved[:: max(1, len(saved) // count)], saved[-1]])
    return {c: minutes_at(known, times[int(c.name.removeprefix("step_"))]) for c in chosen}


def before(run_dir: Path) -> float:
    """Return a run's held-out accuracy before its first step."""
    scores = [json.loads(line)["score"] for line in (run_dir / HELD_OUT).read_text().splitlines()]
    return float(np.mean([score >= 1 for score in scores]))


def machine(run_dir: Path) -> str:
    """Return what a run ran on."""
    environment = json.loads((run_dir / "environment.json").read_text())
    return str(environment["gpu"] or environment["platform"])


def markdown(found: dict[str, Any], picture: str) -> str:
    """Return the study as Markdown: a row for each run, and the picture."""
    heads = ("seed", "run", "accuracy before", "after", "best", "minutes between")
    left = found["interrupted"]
    return "\n".join(
        [
            f"`{found['command']}`, each run on one core ({found['machine']})."
            + (f" Interrupted so far: {', '.join(left)}." if left else ""),
            "",
            f"| {' | '.join(heads)} |",
            "|---|---|---:|---:|---:|---:|",
            *(f"| {' | '.join(row)} |" for row in rows(found["curves"])),
            "",
            f"![held-out accuracy over minutes]({picture})",
            "",
        ]
    )


def rows(results: dict[str, dict[str, Curve]]) -> list[list[str]]:
    """Return for each run: seed, what it is, first, last and best accuracy, minutes."""
    return [
        [
            seed,
            NAMES[kind],
            f"{curve[0][1]:.3f}",
            f"{curve[-1][1]:.3f}",
            f"{max(a for _, a in curve):.3f}",
            f"{curve[-1][0]:.1f}",
        ]
        for seed, curves in results.items()
        for kind, curve in curves.items()
    ]


def draw(path: Path, results: dict[str, dict[str, Curve]]) -> None:
    """Write the picture (PNG): every curve, one colour for each kind of run."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for kind, name in NAMES.items():
        curves = [curves[kind] for curves in results.values() if kind in curves]
        for number, curve in enumerate(curves):
            label = None if number else name
            axes.plot(*zip(*curve), color=COLOURS[kind], label=label, marker=".", alpha=0.8)
    axes.axhline(0.8, color="gray", linestyle=":")
    axes.set(xlabel="minutes", ylabel="held-out accuracy", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=DPI)


def page(found: dict[str, Any], picture: Path) -> str:
    """Return the report: the picture, every run's beginning and end, and what each process took."""
    heads = ["seed", "run", "accuracy before", "accuracy after", "best", "minutes between"]
    spent = [["process", "wall minutes", "CPU minutes, graders included"]]
    spent += [[name, f"{c['wall_minutes']:.1f}", f"{c['cpu_minutes']:.1f}"] for name, c in found["costs"].items()]
    parts = ([heads, *rows(found["curves"])], spent)
    tables = "".join(f"<table>{''.join(map(_row, part))}</table>" for part in parts)
    style = "body{font:15px sans-serif;max-width:60em;margin:2em auto}td{padding:2px 12px}img{width:100%}"
    data = base64.b64encode(picture.read_bytes()).decode()
    return (
        f"<!doctype html><meta charset=utf-8><title>RL study</title><style>{style}</style>"
        "<h1>Reinforcement learning of a tiny model</h1><p>How far it gets in a given time, and that it is the rewards "
        f'that do it. {found["command"]}</p><img alt="held-out accuracy over minutes" '
        f'src="data:image/png;base64,{data}">{tables}'
    )


def _row(cells: list[str]) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
