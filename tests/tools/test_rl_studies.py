"""Studies of reinforcement learning: time over several processes, tables and figures, and a study that is stopped.

Not covered: that a study is large enough to show an effect.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
TINY = [
    "model=tiny",
    "precision=fp32",
    "training.sequence_length=256",
    "rl.rollout.prompts=4",
    "rl.rollout.samples_per_prompt=4",
    "rl.reward.workers=1",
    "rl.held_out_interval_steps=2",
]


def record(step: int, shift: float, replay: bool) -> dict[str, Any]:
    used = {"train_rollout/routing_mismatch_after_replay": 0.0 if replay else 0.03}
    return {
        "step": step,
        "time": 1000.0 + 60 * step,
        "reward/eval_accuracy": 0.1 * step,
        "reward/solved": 0.1,
        "rl/entropy": 0.5,
        "train_rollout/logprob_diff_mean": 0.01 * step,
        "train_rollout/logprob_diff_max": 0.2 + shift,
        "train_rollout/kl": 1e-4,
        "train_rollout/routing_mismatch_layer_0": 0.02,
        "train_rollout/routing_mismatch_layer_1": 0.04,
        "rl/clip_fraction": 0.2,
        "grad_norm": 1.5,
        **used,
    }


def a_run(folder: Path, name: str, *, replay: bool) -> Path:
    """Write the files of a run of two processes: three minutes, a pause of ten, then two."""
    run_dir = folder / name
    (run_dir / "samples").mkdir(parents=True)
    sessions = [
        {"began": 1000.0, "ended": 1180.0, "cpu_seconds": 200.0, "is_last": False},
        {"began": 1780.0, "ended": 1900.0, "cpu_seconds": 100.0, "is_last": True},
    ]
    (run_dir / "sessions.json").write_text(json.dumps(sessions))
    records = [record(step, 0.0, replay) for step in (1, 2)] + [record(3, 0.1, replay) | {"time": 1840.0}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"st')
    scores = "".join(json.dumps({"score": score}) + "\n" for score in (1, 0, 0.5, 1))
    (run_dir / "samples/held_out_0000000.jsonl").write_text(scores)
    (run_dir / "environment.json").write_text(json.dumps({"gpu": None, "platform": "a laptop"}))
    return run_dir


def test_minutes_count_the_processes_only(tmp_path: Path) -> None:
    from tools.studies.rl_studies import accuracy, runs

    run_dir = a_run(tmp_path, "rl-1", replay=True)
    assert runs.has_ended(run_dir)
    assert runs.cost(run_dir) == {"wall_minutes": 5.0, "cpu_minutes": 5.0}
    curve = accuracy.recorded_curve(run_dir)
    assert curve == [(0.0, 0.5), (1.0, 0.1), (2.0, 0.2), (4.0, pytest.approx(0.3))]
    (tmp_path / "latest").symlink_to("rl-1")
    assert runs.runs_in(tmp_path) == [run_dir]


def test_mismatch_tables_and_figure(tmp_path: Path) -> None:
    from tools.studies.rl_studies import mismatch, runs

    rows = {name: runs.records(a_run(tmp_path, name, replay=name == "gspo-replay")) for name in ("gspo-replay", "grpo")}
    first = {name: mismatch.first_rollout(records) for name, records in rows.items()}
    assert first["grpo"]["routing mismatch, mean over layers"] == pytest.approx(0.03)
    assert first["grpo"]["worst layer"] == 0.04
    assert [first[n]["after replay, worst layer"] for n in rows] == [0.0, 0.03]
    whole = {name: mismatch.whole_run(records, 0.5) for name, records in rows.items()}
    assert whole["grpo"]["mean abs. logprob difference"] == pytest.approx(0.02)
    assert (whole["grpo"]["accuracy before"], whole["grpo"]["after"]) == (0.5, pytest.approx(0.3))
    results = {
        "command": "tools/studies/rl_gpu.py",
        "machine": "a laptop",
        "sft": {"steps": 9},
        "first_rollout": first,
        "whole_run": whole,
        "has_ended": dict.fromkeys(rows, True),
        "cost": {name: runs.cost(tmp_path / name) for name in rows},
    }
    text = mismatch.markdown(results, "x.png")
    assert "| gspo-replay | 0.01 | 0.2 | 0.0001 | 0.03 | 0.04 | 0 |" in text
    mismatch.plot(tmp_path / "x.png", rows, dict.fromkeys(rows, 0.5))
    assert (tmp_path / "x.png").stat().st_size > 20_000


@pytest.mark.slow
def test_a_stopped_study_continues(tmp_path: Path) -> None:
    """The first command stops during fine-tuning; the second resumes it and runs both variants."""
    command = [
        sys.executable,
        str(ROOT / "tools/studies/rl_gpu.py"),
        "--variants",
        "gspo-replay,grpo",
        "--workers",
        "2",
        "--steps",
        "4",
        "--output",
        str(tmp_path),
        "--sft",
        "training.steps=25",
    ]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more, *TINY], capture_output=True, text=True, check=False, timeout=280)

    stopped = run("--sft-loss", "0.01", "--minutes", "0.2")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    done = run("--sft-loss", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["has_ended"] == {"gspo-replay": True, "grpo": True}
    first = [results["first_rollout"][name]["largest"] for name in ("gspo-replay", "grpo")]
    assert first[0] == first[1], "the same weights generate the same responses"
    assert [len(rows) for rows in results["records"].values()] == [4, 4]
    assert (tmp_path / "rl-gpu.png").is_file()
    assert not (tmp_path / "grpo/checkpoints").exists()
    again = run("--sft-loss", "100")
    assert again.returncode == 0
    assert json.loads((tmp_path / "results.json").read_text())["records"] == results["records"]
