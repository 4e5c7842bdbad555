"""Resume of pretraining: a run killed at a random moment equals an uninterrupted run bit for bit.

CPU, one process; other layouts and GPUs are not covered here. The validation loss, the data order, Adam's moments and
the expert counts all affect the compared losses.
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

ENTRY_POINT = "megatron_q3n.train"
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
COMPARED = (
    "loss/train",
    "loss/mtp_1",
    "loss/load_balancing",
    "grad_norm",
    "learning_rate",
    "loss/validation",
    "tokens",
)


def compared_metrics(run_dir: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 13)), "each step is recorded once"
    return [{name: record.get(name) for name in COMPARED} for record in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = forked.run(ENTRY_POINT, *SMALL, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return compared_metrics(run_dir)


def test_sigkill_then_resume_changes_nothing(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    run_dir = tmp_path / "run"
    started = forked.start(ENTRY_POINT, *SMALL, f"run_dir={run_dir}")
    metrics = run_dir / "metrics.jsonl"
    num_steps = random.randint(1, 10)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= num_steps):
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.random() * 0.2)
    started.send_signal(signal.SIGKILL)
    started.wait()
    resumed = forked.run(ENTRY_POINT, "--resume", run_dir)
    assert resumed.returncode == 0, resumed.stderr
    assert compared_metrics(run_dir) == uninterrupted, f"killed after {num_steps} steps"


def test_sigterm_saves_and_asks_to_be_requeued(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    run_dir = tmp_path / "run"
    command = [ENTRY_POINT, *SMALL, f"run_dir={run_dir}"]
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
    assert compared_metrics(run_dir) == uninterrupted


@pytest.mark.parametrize(("step", "code"), [(4, 75), (12, 0)])
def test_a_running_save_is_finished_after_sigterm(
    tmp_path: Path, uninterrupted: list[dict[str, Any]], step: int, code: int
) -> None:
    """An asynchronous save that runs when SIGTERM arrives is completed; after the last step the run ends normally."""
    run_dir = tmp_path / "run"
    first = forked.run("tests.stages.terminated_while_saving", step, *SMALL, f"run_dir={run_dir}")
    assert first.returncode == code, first.stderr
    checkpoints = folders.complete_checkpoints(run_dir)
    assert [integrity.find_damage(path, "full") for path in checkpoints] == [[]] * len(checkpoints)
    assert not list((run_dir / "checkpoints").glob(".*.partial"))
    steps = sorted(folders.step_of(path) for path in checkpoints)
    if code == 0:
        assert steps[-1] == 12
    else:
        assert steps[0] == 4, "the one that was being written at SIGTERM"
        assert 4 < steps[-1] < 12, "the final one, written after it"
        assert "SIGTERM received; everything is saved" in first.stdout
        assert forked.run(ENTRY_POINT, "--resume", run_dir).returncode == 0
    assert compared_metrics(run_dir) == uninterrupted


def test_time_limit_saves_and_asks_to_be_requeued(run_module: Callable[..., Any], tmp_path: Path) -> None:
    done = run_module(*SMALL, f"run_dir={tmp_path / 'run'}", "checkpoint.time_limit_minutes=0.0001")
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "run/checkpoints/latest").resolve().name == "step_0000001"
