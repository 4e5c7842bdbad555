"""Faults on a Slurm cluster: a hanging rank, a batch with NaN loss, an unfit node, attempts without progress.

Faults are injected from outside (faults/sitecustomize.py); the code under test has no switch for them.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import SITE, SMALL, decisions, numbers, run_logs, submitted, with_fault

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def test_a_hanging_rank_is_detected_its_stack_saved_and_the_job_requeued(
    cluster: Cluster, site: Callable[..., str], tmp_path: Path, uninterrupted_run: Path
) -> None:
    run_dir = tmp_path / "run"
    (job,) = submitted(
        cluster,
        "--config-name",
        "pretrain-tiny",
        "--nodes",
        "2",
        "--run-dir",
        str(run_dir),
        "--site",
        site(environment=with_fault("hang@6:1", tmp_path / "once")),
        *SMALL,
        "health.hang_min_seconds=6",
        "health.hang_factor=5",
    )
    assert cluster.wait(job, *ENDED) == "COMPLETED", run_logs(run_dir)
    lines = [json.loads(text) for text in (run_dir / "slurm/attempts.jsonl").read_text().splitlines()]
    first, last = (line for line in lines if line["event"] == "end")
    assert first["code"] == 70
    assert "a rank hung" in first["reason"]
    assert first["time"] - lines[1]["time"] < 120, "the limit, and starting up on a busy machine"
    assert last["decision"] == "done"
    stacks = run_dir / "logs" / "stacks"
    assert "sitecustomize.py" in (stacks / "rank_00001.txt").read_text(), "the cause"
    assert "fit.py" in (stacks / "rank_00000.txt").read_text(), "the victim"
    assert "rank 1 on n2: no progress" in run_logs(run_dir)
    numbers(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "roll_back", "stop"])
def test_a_poisoned_batch(cluster: Cluster, site: Callable[..., str], tmp_path: Path, policy: str) -> None:
    run_dir = tmp_path / "run"
    (job,) = submitted(
        cluster,
        "--config-name",
        "pretrain-tiny",
        "--nodes",
        "2",
        "--run-dir",
        str(run_dir),
        "--site",
        site(environment=with_fault("nan@5")),
        *SMALL,
        f"health.non_finite={policy}",
    )
    state, event_log = cluster.wait(job, *ENDED), (run_dir / "logs" / "events.log").read_text()
    assert "step 6: loss nan, gradient norm nan, not finite" in event_log, run_logs(run_dir)
    if policy == "stop":
        assert state == "FAILED"
        assert decisions(run_dir) == ["failed"]
        assert "The run stops (health.non_finite=stop)" in event_log
        assert (run_dir / "checkpoints/latest").resolve().name == "step_0000004"
        return
    assert state == "COMPLETED", run_logs(run_dir)
    expected = {
        "skip": "update withheld (health.non_finite=skip)",
        "roll_back": "going back to step 4, leaving out batch 5 (health.non_finite=roll_back, 1 so far)",
    }
    assert expected[policy] in event_log
    losses = [step["loss/train"] for step in numbers(run_dir)]
    assert [loss is None for loss in losses] == [policy == "skip" and n == 5 for n in range(12)]
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped_steps" if policy == "skip" else "roll_backs"] == 1


@pytest.mark.slow
def test_a_job_without_progress_gives_up(cluster: Cluster, site: Callable[..., str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (job,) = submitted(
        cluster,
        "--config-name",
        "pretrain-tiny",
        "--run-dir",
        str(run_dir),
        "--site",
        site(environment=with_fault("crash@2:0"), attempts_without_progress=2),
        *SMALL,
    )
    assert cluster.wait(job, *ENDED) == "FAILED", run_logs(run_dir)
    assert decisions(run_dir) == ["again", "again", "gave up"]
    assert "2 attempts in a row began at step 0 without progress" in run_logs(run_dir)


def fake_nvidia_smi(folder: Path, body: str) -> str:
    """Write a shell script nvidia-smi; return the line of site setup that puts it first on PATH."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"export PATH={folder}:$PATH"


# Slurm has no GPUs configured; the check counts them with nvidia-smi
ONE_GPU = {**SITE["preflight"], "gpus_expected": 1}


@pytest.mark.slow
def test_an_unfit_node_is_excluded(cluster: Cluster, site: Callable[..., str], tmp_path: Path) -> None:
    """The fake nvidia-smi reports memory errors on n1 only."""
    errors = '[ "$SLURMD_NODENAME" = n1 ] && errors=3\necho "0, 80000, ${errors:-0}"'
    setup = [fake_nvidia_smi(tmp_path / "bin", errors)]
    run_dir = tmp_path / "run"
    (job,) = submitted(
        cluster,
        "--config-name",
        "pretrain-tiny",
        "--run-dir",
        str(run_dir),
        *SMALL,
        "--site",
        site(setup=setup, preflight=ONE_GPU),
    )
    assert cluster.wait(job, *ENDED) == "COMPLETED", run_logs(run_dir)
    assert "pre-flight n1: gpu 0: 3 uncorrected memory errors" in run_logs(run_dir)
    assert (run_dir / "slurm/excluded_nodes.txt").read_text().split() == ["n1"]
    assert "ExcNodeList=n1" in cluster.run("scontrol", "show", "job", job)
    assert decisions(run_dir) == ["again", "done"]


@pytest.mark.slow
def test_preemption_during_the_pre_flight_excludes_no_node(
    cluster: Cluster, site: Callable[..., str], tmp_path: Path
) -> None:
    once = tmp_path / "once"
    slow = f'[ -e {once} ] || {{ touch {once}; sleep 30; }}\necho "0, 80000, 0"'
    setup = [fake_nvidia_smi(tmp_path / "bin", slow)]
    run_dir = tmp_path / "run"
    (job,) = submitted(
        cluster,
        "--config-name",
        "pretrain-tiny",
        "--run-dir",
        str(run_dir),
        *SMALL,
        "--site",
        site(setup=setup, preflight=ONE_GPU),
    )
    deadline = time.monotonic() + 30
    while not once.exists():
        assert time.monotonic() < deadline, run_logs(run_dir)
        time.sleep(0.1)
    cluster.run("scancel", "--signal=TERM", job)
    assert cluster.wait(job, *ENDED) == "COMPLETED", run_logs(run_dir)
    assert decisions(run_dir) == ["again", "done"]
    assert not (run_dir / "slurm/excluded_nodes.txt").exists()
