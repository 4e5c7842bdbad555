"""Parallel layout on a Slurm cluster: two nodes of two processes with TP2 × DP2 give the losses of one process.

Initial weights differ between layouts (each tensor-parallel rank samples its own), so both load the same checkpoint.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import SMALL, numbers, run_logs, submitted, train_without_slurm

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess]


@pytest.mark.parametrize("launcher", ["srun", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_nodes_give_the_losses_of_one_process(
    cluster: Cluster, site: Callable[..., str], tmp_path: Path, uninterrupted_run: Path, launcher: str
) -> None:
    begin = f"checkpoint.load={uninterrupted_run}/checkpoints/step_0000008"
    reference = numbers(train_without_slurm(tmp_path / "one", begin, "training.steps=6"), steps=6)
    run_dir = tmp_path / "four"
    (job,) = submitted(
        cluster,
        "--config-name",
        "pretrain-tiny",
        "--nodes",
        "2",
        "--run-dir",
        str(run_dir),
        "--site",
        site(processes_per_node=2, cpus_per_process=1, launcher=launcher),
        *SMALL,
        begin,
        "training.steps=6",
        "parallel.tensor_model_parallel_size=2",
    )
    assert cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", run_logs(run_dir)
    for ours, theirs in zip(numbers(run_dir, steps=6), reference):
        present = {name: value for name, value in theirs.items() if value is not None}
        assert {name: ours[name] for name in present} == pytest.approx(present, rel=2e-4)
    assert "4 process(es)" in (run_dir / "logs" / "events.log").read_text()
