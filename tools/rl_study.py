#!/usr/bin/env python
"""How far reinforcement learning gets with a tiny model in a given time, and that it is the rewards that do it.

    .venv/bin/python tools/rl_study.py --output runs/rl-study [--seeds 3] [--minutes 12] [--workers 1] [setting=value …]

For each seed: sft-tiny, then from it for the same wall time each: rl-tiny, rl-tiny with its rewards dealt out at random
(the control), and the same fine-tuning continued. Accuracy is that of the likeliest answers to the held-out questions
of rl-tiny, each run on one core. Further settings go to rl-tiny. Leaves results.json and report.html; what is there
already is not run again, so a study that was interrupted goes on.
"""

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
STOPPED = 75  # by the time limit, with everything saved
EXAMINED = 6  # checkpoints of the continued fine-tuning
COLOURS = {"rl": "tab:blue", "control": "tab:orange", "sft": "tab:green"}
NAMES = {"rl": "rl-tiny", "control": "rl-tiny, shuffled rewards", "sft": "sft-tiny continued"}
ENDLESS = "training.steps=100000"
HELD_OUT = "samples/held_out_0000000.jsonl"  # a run's answers before its first step
Curve = list[tuple[float, float]]  # (minutes, accuracy)


@dataclass(frozen=True)
class Bench:
    """Where runs go, and how many of them run at once."""

    output: Path
    places: threading.BoundedSemaphore

    def train(self, recipe: str, name: str, *settings: str) -> Path:
        """Run a recipe on one core unless it has been run; return its directory."""
        run_dir = self.output / name
        if not (run_dir / "cost.json").is_file():
            with self.places:
                cost = _run(recipe, run_dir, "logging.wandb.mode=disabled", *settings)
            (run_dir / "cost.json").write_text(json.dumps(cost))
        return run_dir

    def accuracy_of(self, checkpoint: Path, name: str) -> float:
        """Return a checkpoint's held-out accuracy, by a run that examines it before its only step."""
        once = ("training.steps=1", "rl.held_out_interval_steps=0")
        run_dir = self.train("rl-tiny", name, f"checkpoint.load={checkpoint}", *once)
        return full_marks(run_dir / HELD_OUT)


def main() -> int:
    """Run what is missing, then write results and report.

    Returns: 0.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "rl-study")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=12, help="of each run after sft-tiny")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--only-sft", action="store_true", help="stop after the runs of sft-tiny")
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    options = parser.parse_args()
    bench = Bench(options.output.resolve(), threading.BoundedSemaphore(options.workers))
    seeds = range(1, options.seeds + 1)
    with ThreadPoolExecutor(8 * options.seeds) as threads:
        starts = list(threads.map(lambda seed: fine_tuned(bench, seed), seeds))
        if options.only_sft:
            return 0
        studies = {
            f"seed {seed}": begin(bench, threads, seed, start, options.minutes, options.settings)
            for seed, start in zip(seeds, starts)
        }
        results = {
            seed: {kind: future.result() for kind, future in study.items()}
            for seed, study in studies.items()
        }
    costs = {p.parent.name: json.loads(p.read_text()) for p in bench.output.glob("*/cost.json")}
    (bench.output / "results.json").write_text(
        json.dumps({"curves": results, "costs": costs}, indent=1)
    )
    (bench.output / "report.html").write_text(page(results, costs))
    print("\n".join(" ".join(row) for row in table(results)))
    return 0


def fine_tuned(bench: Bench, seed: int) -> Path:
    """Return what a seed's other runs begin from."""
    return bench.train("sft-tiny", f"sft-{seed}", f"training.seed={seed}")


def begin(
    bench: Bench,
    threads: ThreadPoolExecutor,
    seed: int,
    start: Path,
    minutes: float,
    settings: list[str],
) -> dict[str, Future[Curve]]:
    """Start a seed's three runs; their accuracies over time come in time."""
    limit = (
        f"checkpoint.load={start}", f"checkpoint.time_limit_minutes={minutes}", f"training.seed={seed}", ENDLESS,
    )  # fmt: skip

    def learnt(name: str, *more: str) -> Curve:
        return measured(bench.train("rl-tiny", f"{name}-{seed}", *limit, *settings, *more))

    def continued() -> Curve:
        more = (
            "checkpoint.load_optimizer=true", "schedule.style=constant", "schedule.warmup_steps=0",
            "schedule.lr=3e-4", "sft.tokenizer_vocab_size=null", "sft.chat_template=null",
            "checkpoint.interval_steps=100", "checkpoint.keep_last=1000", "validation.interval_steps=0",
        )  # fmt: skip
        run_dir = bench.train("sft-tiny", f"sft_more-{seed}", *limit, *more)
        return examined(bench, threads, run_dir, start)

    return {
        "rl": threads.submit(learnt, "rl"),
        "control": threads.submit(learnt, "control", "rl.shuffled_rewards=true"),
        "sft": threads.submit(continued),
    }


def _run(recipe: str, run_dir: Path, *settings: str) -> dict[str, float]:
    """Run a recipe in a process of its own. Returns: what it took, wall and CPU minutes with its children's."""
    command = [sys.executable, "-m", "megatron_q3n.train", "--config-name", recipe]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    run_dir.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (run_dir / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [*command, f"run_dir={run_dir}", "logging.progress=false", *settings],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, used = os.wait4(process.pid, 0)  # Popen.wait does not tell what was used
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, STOPPED):
        raise SystemExit(f"{recipe} ended with {process.returncode}: {run_dir / 'output.txt'}")
    cpu = used.ru_utime + used.ru_stime
    return {"wall_minutes": (time.monotonic() - began) / 60, "cpu_minutes": cpu / 60}


def measured(run_dir: Path) -> Curve:
    """Return the held-out accuracy that a run of rl-tiny measured itself."""
    records = _records(run_dir)
    begin = records[0]["time"] - records[0]["throughput/step_seconds"]
    points = [(r["time"], r["reward/held_out"]) for r in records if "reward/held_out" in r]
    return [
        (0.0, full_marks(run_dir / HELD_OUT)),
        *(((time - begin) / 60, share) for time, share in points),
    ]


def examined(bench: Bench, threads: ThreadPoolExecutor, run_dir: Path, start: Path) -> Curve:
    """Examine where a continued fine-tuning began, and some of its checkpoints."""
    times = {record["step"]: record["time"] for record in _records(run_dir)}
    saved = sorted((run_dir / "checkpoints").glob("step_*[0-9]"))
    chosen = dict.fromkeys([*saved[:: max(1, len(saved) // EXAMINED)], saved[-1]])
    minutes = {c: (times[int(c.name.removeprefix("step_"))] - times[1]) / 60 for c in chosen}
    places = {start: 0.0, **minutes}
    accuracies = threads.map(
        lambda c: bench.accuracy_of(c, f"examined-{run_dir.name}-{c.name}"), places
    )
    return list(zip(places.values(), accuracies))


def full_marks(file: Path) -> float:
    """Return the share of full marks in a table of samples."""
    scores = [json.loads(line)["score"] for line in file.read_text().splitlines()]
    return sum(score >= 1 for score in scores) / len(scores)


def table(results: dict[str, dict[str, Curve]]) -> list[list[str]]:
    """Return a row for each run: seed, what it is, first and last accuracy, minutes."""
    return [
        [seed, NAMES[kind], f"{curve[0][1]:.3f}", f"{curve[-1][1]:.3f}", f"{curve[-1][0]:.1f}"]
        for seed, curves in results.items()
        for kind, curve in curves.items()
    ]


def page(results: dict[str, dict[str, Curve]], costs: dict[str, dict[str, float]]) -> str:
    """Return the report: the plot, every run's beginning and end, and what each cost."""
    heads = ("seed", "run", "accuracy before", "accuracy after", "minutes between")
    rows = [heads, *table(results)]
    spent = [("process", "wall minutes", "CPU minutes, graders included")]
    spent += [
        (name, f"{c['wall_minutes']:.1f}", f"{c['cpu_minutes']:.1f}") for name, c in costs.items()
    ]
    tables = "".join(f"<table>{''.join(map(_row, part))}</table>" for part in (rows, spent))
    style = "body{font:15px sans-serif;max-width:60em;margin:2em auto}td{padding:2px 12px}img{width:100%}"
    return (
        f"<!doctype html><meta charset=utf-8><title>RL study</title><style>{style}</style>"
        f"<h1>Reinforcement learning of a tiny model</h1><p>{__doc__.splitlines()[0]}</p>"
        f'<img alt="held-out accuracy over minutes" src="data:image/png;base64,{plot(results)}">{tables}'
    )


def plot(results: dict[str, dict[str, Curve]]) -> str:
    """Draw every curve, one colour for each kind of run; return the PNG in base 64."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for number, curves in enumerate(results.values()):
        for kind, curve in curves.items():
            label = None if number else NAMES[kind]
            axes.plot(*zip(*curve), color=COLOURS[kind], label=label, marker=".", alpha=0.8)
    axes.axhline(0.8, color="gray", linestyle=":")
    axes.set(xlabel="minutes", ylabel="held-out accuracy", ylim=(0, 1))
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return base64.b64encode(picture.getvalue()).decode()


def _records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _row(cells: Any) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


if __name__ == "__main__":
    sys.exit(main())
