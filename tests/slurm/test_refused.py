"""Checks before submission: a recipe that cannot run is rejected with one message; a dry run writes nothing.

Slurm is not needed, because the checks come first.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_q3n.config import UserError, validate
from slurm import checks
from slurm.site import load_site
from tests.slurm.runs import ROOT


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slurm.submit", "--dry-run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["parallel.tensor_model_parallel_size=3", "--nodes", "3"], "not divisible by parallel.tensor_model_parallel"),
        (["--nodes", "3"], "training.global_batch_size=4 is not divisible by"),
        (["data=blend", "data.train=[{path: /nowhere}]", "data.validation=[{path: /nowhere}]"], "/nowhere"),
        (["model=80b_a3b", "checkpoint.keep_last=100000"], "checkpoints take about"),
        (["checkpoint.load=/nowhere/run"], "/nowhere/run: no checkpoint found"),
        (["training.stesp=3"], "training.stesp: no such setting"),
    ],
)
def test_refused(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    run_dir = tmp_path / "run"
    done = dry_run("--config-name", "pretrain-tiny", "--run-dir", str(run_dir), *arguments)
    assert done.returncode == 2, done.stdout
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not run_dir.exists()


def test_a_pipeline_is_checked_as_a_whole(tmp_path: Path) -> None:
    done = dry_run(
        "--config-name", "pipeline-tiny", "--run-dir", str(tmp_path / "p"), "longcontext.training.micro_batch_size=3"
    )
    assert done.returncode == 2
    assert "training.micro_batch_size=3" in done.stderr
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["rl.rl.prompts=[{path: /nowhere/p.jsonl}]", "rl.rl.reward.kind=math_verify"],
        ["mtp.sft.train=[{path: /nowhere/p.jsonl}]"],
    ],
)
def test_data_of_a_later_stage_is_checked_too(overrides: list[str]) -> None:
    done = dry_run("--config-name", "pipeline-tiny", *overrides)
    assert done.returncode == 2
    assert "/nowhere/p.jsonl does not exist on this machine" in done.stderr


def test_a_stage_that_does_not_match_the_previous_one_is_rejected(tmp_path: Path) -> None:
    done = dry_run("--config-name", "pipeline-tiny", "longcontext.model.moe_ffn_hidden_size=48")
    assert done.returncode == 2
    assert "model.moe_ffn_hidden_size: 64 there, 48 here" in done.stderr


def test_dry_run_shows_script_and_description(
    tmp_path: Path, site: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "sesame-open")
    site_file = site(account="lab", setup=["module load cuda"], environment={"NCCL_SOCKET_IFNAME": "ib0"})
    done = dry_run(
        "--config-name",
        "pretrain-tiny",
        "--site",
        site_file,
        "--nodes",
        "2",
        "--run-dir",
        str(tmp_path / "r"),
        "training.micro_batch_size=2",
    )
    assert done.returncode == 0, done.stderr
    for line in (
        "#SBATCH --account=lab",
        "#SBATCH --nodes=2",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@60",
        "module load cuda",
        "export NCCL_SOCKET_IFNAME=ib0",
    ):
        assert line in done.stdout.splitlines()
    assert "sesame-open" not in done.stdout, "variables of the shell are not written"
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"environment": {"WANDB_API_KEY": "x"}}, "looks like a secret"),
        ({"setup": ["export HF_TOKEN=abc"]}, "looks like a secret"),
        ({"partitoin": "gpu"}, "partitoin"),
        ({"time": "tomorrow"}, "hours:minutes:seconds"),
        ({"launcher": "mpirun"}, "launcher"),
    ],
)
def test_an_invalid_site_is_rejected(site: Callable[..., str], changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_site(site(**changes))


def test_the_example_site_is_valid() -> None:
    site = load_site("example")
    assert site.ranks_per_node == 8
    assert site.preflight is not None


def test_a_model_larger_than_the_gpus_of_the_site_is_rejected(site: Callable[..., str]) -> None:
    config = validate({"training": {"global_batch_size": 4096, "micro_batch_size": 4096}})
    small = load_site(site(gpus_per_node=1, gpu_memory_gib=4.5))
    with pytest.raises(UserError, match="the largest rank needs"):
        checks.check_run(config, small, 1)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes").glob("pipeline-*.yaml")))
def test_every_pipeline_could_be_submitted(tmp_path: Path, name: str) -> None:
    done = dry_run("--config-name", name, "--run-dir", str(tmp_path / "p"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/bin/bash") >= 3


def test_the_training_command_names_the_command_for_pipelines() -> None:
    command = [sys.executable, "-m", "megatron_q3n.train", "--config-name", "pipeline-tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "python -m slurm.submit --config-name pipeline-tiny" in done.stderr
