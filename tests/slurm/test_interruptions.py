"""On a real Slurm: whatever interrupts a job, the run goes on by itself and ends as one never interrupted.

Two nodes with one process each. The reference is one process without Slurm, so equality is up to the rounding of
a sum over two ranks; the learning rate, the data order and the set of steps must be exact.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import SMALL, decisions, numbers, ranks_of, story, submitted, wait_for_steps, with_fault

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def assert_same_losses(run_dir: Path, reference: Path, steps: int = 12) -> None:
    ours, theirs = numbers(run_dir, steps), numbers(reference, steps)
    for step, (mine, other) in enumerate(zip(ours, theirs), start=1):
        present = {name: value for name, value in other.items() if value is not None}
        assert {name: mine[name] for name in present} == pytest.approx(present, rel=2e-4), step


def test_preempted_by_a_higher_partition(
    cluster: Cluster, site: Callable[..., str], tmp_path: Path, uninterrupted: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--config-name", "pretrain-tiny", "--site", site(), "--nodes", "2"]
    # wandb runs beside it: its service gets every signal that Slurm sends to the step
    (job,) = submitted(cluster, *arguments, "--run-dir", str(run_dir), *SMALL, "logging.wandb.mode=offline")
    wait_for_steps(run_dir, 3)
    wanted = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    urgent = cluster.run("sbatch", "--parsable", *wanted, "--wrap", "sleep 2")
    cluster.wait(urgent, "COMPLETED")
    assert cluster.wait(job, *ENDED) == "COMPLETED", story(run_dir)
    assert decisions(run_dir) == ["again", "done"], story(run_dir)
    assert "SIGTERM received; everything is saved" in story(run_dir)
    assert_same_losses(run_dir, uninterrupted)


@pytest.mark.slow
def test_requeued_node_lost_and_killed_in_one_run(
    cluster: Cluster, site: Callable[..., str], tmp_path: Path, uninterrupted: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--config-name", "pretrain-tiny", "--site", site(), "--nodes", "2"]
    (job,) = submitted(cluster, *arguments, "--run-dir", str(run_dir), *SMALL)

    wait_for_steps(run_dir, 2)
    cluster.run("scontrol", "requeue", job)
    cluster.wait(job, "PENDING", "RUNNING")

    wait_for_attempts(run_dir, 2)
    wait_for_steps(run_dir, 6)
    cluster.lose("n2")
    cluster.wait(job, "PENDING")
    cluster.bring_back("n2")

    wait_for_attempts(run_dir, 3)
    wait_for_steps(run_dir, 9)
    ranks_of(run_dir)[0].send_signal(signal.SIGKILL)

    assert cluster.wait(job, *ENDED) == "COMPLETED", story(run_dir)
    wait_for_attempts(run_dir, 4)
    assert decisions(run_dir)[-2:] == ["again", "done"], story(run_dir)
    assert_same_losses(run_dir, uninterrupted)


def wait_for_attempts(run_dir: Path, count: int, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while (run_dir / "slurm" / "attempts.jsonl").read_text().count('"begin"') < count:
        assert time.monotonic() < deadline, story(run_dir)
        time.sleep(0.1)


@pytest.mark.slow
def test_told_to_end_with_everything_it_requeues_but_cancelled_it_does_not(
    cluster: Cluster, site: Callable[..., str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--config-name", "pretrain-tiny", "--site", site(), *SMALL, "training.steps=1000000"]
    (job,) = submitted(cluster, *arguments, "--run-dir", str(run_dir), "logging.interval_steps=1000")
    wait_for_steps(run_dir, 5)
    cluster.run("scancel", "--full", "--signal=TERM", job)  # the batch script, srun, everybody
    wait_for_attempts(run_dir, 2)
    wait_for_steps(run_dir, 9)
    cluster.run("scancel", job)
    assert cluster.wait(job, *ENDED) == "CANCELLED", story(run_dir)
    time.sleep(3)
    assert cluster.state(job) == "CANCELLED"
    assert decisions(run_dir)[0] == "again"
    assert set(decisions(run_dir)[1:]) <= {"ended by Slurm"}


@pytest.mark.slow
def test_time_limit(cluster: Cluster, site: Callable[..., str], tmp_path: Path, uninterrupted: Path) -> None:
    """Slurm counts limits in minutes and may send its warning a minute early, so the limit here is three; the runs, one
    of each launcher on the same nodes, wait for it in their sixth step."""
    runs = {}
    for launcher in ("srun", "torchrun"):
        run_dir = tmp_path / launcher
        held = with_fault("hold@6:0", tmp_path / f"once-{launcher}")
        slices = site(time="3:00", save_margin_seconds=60, launcher=launcher, environment=held, cpus_per_process=1)
        (job,) = submitted(
            cluster,
            "--config-name",
            "pretrain-tiny",
            "--site",
            slices,
            "--nodes",
            "2",
            "--run-dir",
            str(run_dir),
            *SMALL,
        )
        runs[run_dir] = job
    for run_dir, job in runs.items():
        assert cluster.wait(job, *ENDED, seconds=420) == "COMPLETED", story(run_dir)
        assert decisions(run_dir) == ["again", "done"], story(run_dir)
        assert "the time limit is near" in story(run_dir)
        assert "SIGTERM received; everything is saved" in story(run_dir)
        assert "resumed from step_0000006" in story(run_dir)
        assert_same_losses(run_dir, uninterrupted)


@pytest.mark.slow
def test_asked_by_a_person_it_ends_and_stays_ended(cluster: Cluster, site: Callable[..., str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--config-name", "pretrain-tiny", "--site", site(), "--run-dir", str(run_dir)]
    (job,) = submitted(cluster, *arguments, *SMALL, "training.steps=1000000")
    wait_for_steps(run_dir, 2)
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    cluster.wait(job, *ENDED)
    assert decisions(run_dir) == ["stopped"], story(run_dir)
    assert "SIGTERM received; everything is saved" in story(run_dir)
