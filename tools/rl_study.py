#!/usr/bin/env python
"""How far reinforcement learning gets with a tiny model in a given time, and that it is the rewards that do it.

    .venv/bin/python tools/rl_study.py --output runs/rl-study [--seeds 3] [--minutes 12] [setting=value …]

For each seed: sft-tiny, then from it for the same wall time each: rl-tiny, rl-tiny with its rewards dealt out at random
(the control), and the same fine-tuning continued. Accuracy is that of the likeliest answers to the held-out questions
of rl-tiny. Further settings go to rl-tiny. Leaves results.json and study.png; what is there already is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
STOPPED = 75  # by the time limit, with everything saved
EXAMINED = 6  # checkpoints of the continued fine-tuning
COLOURS = {"rl": "tab:blue", "control": "tab:orange", "sft": "tab:green"}
Curve = list[tuple[float, float]]  # (minutes, accuracy)


def main() -> int:
    """Run what is missing, then write results and plot.

    Returns: 0.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "rl-study")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    options = parser.parse_args()
    results = {
        f"seed {seed}": study(
            options.output / f"seed{seed}", seed, options.minutes, options.settings
        )
        for seed in range(1, options.seeds + 1)
    }
    (options.output / "results.json").write_text(json.dumps(results, indent=1))
    plot(results, options.output / "study.png")
    for name, curves in results.items():
        ends = ", ".join(f"{kind} {c[0][1]:.3f} -> {c[-1][1]:.3f}" for kind, c in curves.items())
        print(f"{name}: {ends}")
    return 0


def study(folder: Path, seed: int, minutes: float, settings: list[str]) -> dict[str, Curve]:
    """Return the accuracy over time of each kind of run for one seed."""
    own = [f"training.seed={seed}", "logging.wandb.mode=disabled"]
    start = train("sft-tiny", folder / "sft", *own)
    limit = [f"checkpoint.load={start}", f"checkpoint.time_limit_minutes={minutes}", *own]
    endless = ["training.steps=100000", "schedule.style=constant", "schedule.warmup_steps=0"]
    learnt = train("rl-tiny", folder / "rl", *limit, *endless[:1], *settings)
    shuffled = ["rl.shuffled_rewards=true", *settings]
    control = train("rl-tiny", folder / "control", *limit, *endless[:1], *shuffled)
    more = train(
        "sft-tiny", folder / "sft_more", *limit, *endless, "schedule.lr=4e-4",
        "sft.tokenizer_vocab_size=null", "checkpoint.interval_steps=50", "checkpoint.keep_last=1000",
        "validation.interval_steps=0",
    )  # fmt: skip
    return {
        "rl": rl_curve(learnt),
        "control": rl_curve(control),
        "sft": sft_curve(more, accuracy_of(start, folder / "examined"), folder / "examined"),
    }


def train(recipe: str, run_dir: Path, *settings: str) -> Path:
    """Run a recipe unless it has been run, and return its directory."""
    outcome = run_dir / "logs" / "outcome.json"
    if outcome.is_file() and json.loads(outcome.read_text())["code"] in (0, STOPPED):
        return run_dir
    command = [sys.executable, "-m", "megatron_q3n.train", "--config-name", recipe]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, f"run_dir={run_dir}", *settings],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode not in (0, STOPPED):
        raise SystemExit(f"{recipe} in {run_dir} ended with {done.returncode}")
    return run_dir


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return what a run recorded."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def rl_curve(run_dir: Path) -> Curve:
    """Return the held-out accuracy that a run measured itself."""
    records = records_of(run_dir)
    begin = records[0]["time"]
    measured = [(r["time"], r["reward/held_out"]) for r in records if "reward/held_out" in r]
    first = examined(run_dir / "samples" / "held_out_0000000.jsonl")
    return [(0.0, first), *(((time - begin) / 60, accuracy) for time, accuracy in measured)]


def sft_curve(run_dir: Path, first: float, folder: Path) -> Curve:
    """Examine some of a fine-tuning's checkpoints."""
    times = {record["step"]: record["time"] for record in records_of(run_dir)}
    begin = times[min(times)]
    saved = sorted((run_dir / "checkpoints").glob("step_*[0-9]"))
    chosen = saved[:: max(1, len(saved) // EXAMINED)] + saved[-1:]
    curve = [(0.0, first)]
    for checkpoint in dict.fromkeys(chosen):
        minutes = (times[int(checkpoint.name.removeprefix("step_"))] - begin) / 60
        curve.append((minutes, accuracy_of(checkpoint, folder)))
    return curve


def accuracy_of(checkpoint: Path, folder: Path) -> float:
    """Return a checkpoint's held-out accuracy, by a run that examines it before its only step."""
    name = f"{checkpoint.parent.parent.name}-{checkpoint.name}"
    quiet = ["training.steps=1", "rl.held_out_interval_steps=0", "logging.wandb.mode=disabled"]
    run_dir = train("rl-tiny", folder / name, f"checkpoint.load={checkpoint}", *quiet)
    return examined(run_dir / "samples" / "held_out_0000000.jsonl")


def examined(file: Path) -> float:
    """Return the share of full marks in a table of samples."""
    scores = [json.loads(line)["score"] for line in file.read_text().splitlines()]
    return sum(score >= 1 for score in scores) / len(scores)


def plot(results: dict[str, dict[str, Curve]], file: Path) -> None:
    """Draw every curve, one colour for each kind of run."""
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for number, curves in enumerate(results.values()):
        for kind, curve in curves.items():
            label = kind if number == 0 else None
            axes.plot(*zip(*curve), color=COLOURS[kind], label=label, marker=".", alpha=0.8)
    axes.set(xlabel="minutes", ylabel="held-out accuracy", ylim=(0, 1))
    axes.legend()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
