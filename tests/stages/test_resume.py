"""Killed at a random moment and resumed from its directory alone, a run is the run that was never
interrupted, bit for bit.

CPU, one process; other layouts and a GPU are not covered here. The validation loss, the data order,
Adam's moments and the expert counts all enter the compared losses.
"""

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.checkpoint import folders, integrity
from tests import forked

DOOR = "megatron_q3n.train"
SMALL = [
    "--config-name",
    "pretrain-tiny",
    "training.steps=12",
    "training.sequence_length=64",
    "validation.interval_steps=5",
    "validation.batches=1",
    "validation.bigram_baseline=false",
    "checkpoint.interval_steps=4",
    "samples.count=0",
    "schedule.warmup_steps=2",
    "logging.wandb.mode=offline",
]
COMPARED = ("loss/train", "loss/mtp_1", "loss/balance", "grad_norm", "learning_rate", "loss/validation", "tokens")


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 13)), "each step once"
    return [{name: record.get(name) for name in COMPARED} for record in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = forked.run(DOOR, *SMALL, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return numbers(run_dir)


def test_sigkill_then_resume_changes_nothing(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    run_dir = tmp_path / "run"
    started = forked.start(DOOR, *SMALL, f"run_dir={run_dir}")
    metrics = run_dir / "metrics.jsonl"
    seen = random.randint(1, 10)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= seen):
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.random() * 0.2)
    started.send_signal(signal.SIGKILL)
    started.wait()
    resumed = forked.run(DOOR, "--resume", run_dir)
    assert resumed.returncode == 0, resumed.stderr
    assert numbers(run_dir) == uninterrupted, f"killed after {seen} steps"


def test_sigterm_saves_and_asks_to_be_requeued(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    run_dir = tmp_path / "run"
    command = [DOOR, *SMALL, f"run_dir={run_dir}"]
    first = forked.start(*command)
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    stopped = first.wait()
    assert stopped.returncode == 75
    assert "SIGTERM received; everything is saved" in stopped.stdout
    # the same command again, as a scheduler requeues it
    other = forked.run(*command, "training.global_batch_size=8")
    assert other.returncode == 2
    assert "training.global_batch_size: 4 there, 8 here" in other.stderr
    second = forked.run(*command)
    assert second.returncode == 0, second.stderr
    assert "resumed from step_" in second.stdout
    assert numbers(run_dir) == uninterrupted


@pytest.mark.parametrize(("step", "code"), [(4, 75), (12, 0)])
def test_a_save_under_way_when_told_to_end_is_finished(
    tmp_path: Path, uninterrupted: list[dict[str, Any]], step: int, code: int
) -> None:
    """A checkpoint half written behind the training is neither lost nor left; after the last step the run just ends."""
    run_dir = tmp_path / "run"
    first = forked.run("tests.stages.told_while_saving", step, *SMALL, f"run_dir={run_dir}")
    assert first.returncode == code, first.stderr
    kept = folders.complete(run_dir)
    assert [integrity.damage(path, "full") for path in kept] == [[]] * len(kept)
    assert not list((run_dir / "checkpoints").glob(".*.partial"))
    steps = sorted(folders.step_of(path) for path in kept)
    if code == 0:
        assert steps[-1] == 12
    else:
        assert steps[0] == 4, "the one that was being written"
        assert 4 < steps[-1] < 12, "and the one of the end, which waited for it"
        assert "SIGTERM received; everything is saved" in first.stdout
        assert forked.run(DOOR, "--resume", run_dir).returncode == 0
    assert numbers(run_dir) == uninterrupted


def test_time_limit_saves_and_asks_to_be_requeued(run_module: Callable[..., Any], tmp_path: Path) -> None:
    done = run_module(*SMALL, f"run_dir={tmp_path / 'run'}", "checkpoint.time_limit_minutes=0.0001")
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "run/checkpoints/latest").resolve().name == "step_0000001"
