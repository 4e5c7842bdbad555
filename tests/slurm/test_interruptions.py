"""Interruptions on a Slurm cluster: the run resumes automatically and gives the results of an uninterrupted run.

Two nodes with one process each. The reference is one process without Slurm, so losses are equal up to the rounding of a
sum over two ranks; learning rate, data order and recorded steps must be exact.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import SMALL, decisions, numbers, ranks_of, run_logs, submitted, wait_for_steps, with_fault

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def assert_same_losses(run_dir: Path, reference: Path, steps: int = 12) -> None:
    ours, theirs = numbers(run_dir, steps), numbers(reference, steps)
    for step, (mine, other) in enumerate(zip(ours, theirs), start=1):
        present = {name: value for name, value in other.items() if value is not None}
        assert {name: mine[name] for name in present} == pytest.approx(present, rel=2e-4), step


def test_preempted_by_a_higher_partition(
    cluster: Cluster, site: Callable[..., str], tmp_path: Path, uninterrupted_run: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--config-name", "pretrain-tiny", "--site", site(), "--nodes", "2"]
    # with wandb, whose service process receives every signal that Slurm sends to the step
    (job,) = submitted(cluster, *arguments, "--run-dir", str(run_dir), *SMALL, "logging.wandb.mode=offline")
    wait_for_steps(run_dir, 3)
    options = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    preempting_job = cluster.run("sbatch", "--parsable", *options, "--wrap", "sleep 2")
    cluster.wait(preempting_job, "COMPLETED")
    assert cluster.wait(job, *ENDED) == "COMPLETED", run_logs(run_dir)
    assert decisions(run_dir) == ["again", "done"], run_logs(run_dir)
    assert "SIGTERM received; everything is saved" in run_logs(run_dir)
    assert_same_losses(run_dir, uninterrupted_run)


@pytest.mark.slow
def test_requeued_node_lost_and_killed_in_one_run(
    cluster: Cluster, site: Callable[..., str], tmp_path: Path, uninterrupted_run: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--config-name", "pretrain-tiny", "--site", site(), "--nodes", "2"]
    (job,) = submitted(cluster, *arguments, "--run-dir", str(run_dir), *SMALL)

    wait_for_steps(run_dir, 2)
    cluster.run("scontrol", "requeue", job)
    cluster.wait(job, "PENDING", "RUNNING")

    wait_for_attempts(run_dir, 2)
    wait_for_steps(run_dir, 6)
    cluster.set_down("n2")
    cluster.wait(job, "PENDING")
    cluster.resume_node("n2")

    wait_for_attempts(run_dir, 3)
    wait_for_steps(run_dir, 9)
    ranks_of(run_dir)[0].send_signal(signal.SIGKILL)

    assert cluster.wait(job, *ENDED) == "COMPLETED", run_logs(run_dir)
    wait_for_attempts(run_dir, 4)
    assert decisions(run_dir)[-2:] == ["again", "done"], run_logs(run_dir)
    assert_same_losses(run_dir, uninterrupted_run)


def wait_for_attempts(run_dir: Path, count: int, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while (run_dir / "slurm" / "attempts.jsonl").read_text().count('"begin"') < count:
        assert time.monotonic() < deadline, run_logs(run_dir)
        time.sleep(0.1)


@pytest.mark.slow
def test_term_to_all_processes_requeues_but_scancel_does_not(
    cluster: Cluster, site: Callable[..., str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--config-name", "pretrain-tiny", "--site", site(), *SMALL, "training.steps=1000000"]
    (job,) = submitted(cluster, *arguments, "--run-dir", str(run_dir), "logging.interval_steps=1000")
    wait_for_steps(run_dir, 5)
    # to all processes: the batch script, srun and the ranks
    cluster.run("scancel", "--full", "--signal=TERM", job)
    wait_for_attempts(run_dir, 2)
    wait_for_steps(run_dir, 9)
    cluster.run("scancel", job)
    assert cluster.wait(job, *ENDED) == "CANCELLED", run_logs(run_dir)
    time.sleep(3)
    assert cluster.state(job) == "CANCELLED"
    assert decisions(run_dir)[0] == "again"
    assert set(decisions(run_dir)[1:]) <= {"ended by Slurm"}


@pytest.mark.slow
def test_time_limit(cluster: Cluster, site: Callable[..., str], tmp_path: Path, uninterrupted_run: Path) -> None:
    """Slurm has time limits in minutes and may send its warning a minute early, so the limit is three minutes. One run
    per launcher, both on the same nodes, is held in its sixth step until the warning."""
    runs = {}
    for launcher in ("srun", "torchrun"):
        run_dir = tmp_path / launcher
        hold_fault = with_fault("hold@6:0", tmp_path / f"once-{launcher}")
        site_file = site(
            time="3:00", save_margin_seconds=60, launcher=launcher, environment=hold_fault, cpus_per_process=1
        )
        (job,) = submitted(
            cluster,
            "--config-name",
            "pretrain-tiny",
            "--site",
            site_file,
            "--nodes",
            "2",
            "--run-dir",
            str(run_dir),
            *SMALL,
        )
        runs[run_dir] = job
    for run_dir, job in runs.items():
        assert cluster.wait(job, *ENDED, seconds=420) == "COMPLETED", run_logs(run_dir)
        assert decisions(run_dir) == ["again", "done"], run_logs(run_dir)
        assert "the time limit is near" in run_logs(run_dir)
        assert "SIGTERM received; everything is saved" in run_logs(run_dir)
        assert "resumed from step_0000006" in run_logs(run_dir)
        assert_same_losses(run_dir, uninterrupted_run)


@pytest.mark.slow
def test_usr2_ends_the_job_without_requeue(cluster: Cluster, site: Callable[..., str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--config-name", "pretrain-tiny", "--site", site(), "--run-dir", str(run_dir)]
    (job,) = submitted(cluster, *arguments, *SMALL, "training.steps=1000000")
    wait_for_steps(run_dir, 2)
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    cluster.wait(job, *ENDED)
    assert decisions(run_dir) == ["stopped"], run_logs(run_dir)
    assert "SIGTERM received; everything is saved" in run_logs(run_dir)
