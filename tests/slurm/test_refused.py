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
        (["--nodes", "0"], "--nodes 0: at least one node"),
        (["--nodes", "-2"], "--nodes -2: at least one node"),
        (["--time", "soon"], "--time: 'soon' is not a time limit"),
        (["--time", "1:00\n#SBATCH --reboot"], "--time: '1:00\\n#SBATCH --reboot' is not a time limit"),
        (["run_dir=elsewhere"], "give one of them"),
        (["--update-code"], "--update-code is for --resume"),
        (["--config-dir", "/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_refused(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    run_dir = tmp_path / "run"
    done = dry_run("--config-name", "pretrain-tiny", "--run-dir", str(run_dir), *arguments)
    assert done.returncode == 2, done.stdout
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not run_dir.exists()


@pytest.mark.parametrize("name", ["../recipes/pretrain-tiny", "a/b", "pipeline-../x", "a\nb", ""])
def test_a_recipes_name_is_no_path(name: str) -> None:
    done = dry_run("--config-name", name)
    assert done.returncode == 2
    assert "is not the name of a recipe" in done.stderr


def test_what_would_be_refused_is_said_beside_the_script(tmp_path: Path) -> None:
    """A rule between settings, and one of the site: both are beside the script, of the requested size."""
    for arguments, complaint in (
        (["--config-name", "pretrain-80b_a3b", "--nodes", "4"], "the world size=4 is not divisible by"),
        (["--config-name", "pretrain-tiny", "checkpoint.load=/nowhere/run"], "/nowhere/run: no checkpoint found"),
    ):
        done = dry_run(*arguments, "--run-dir", str(tmp_path / "run"))
        assert done.returncode == 2
        assert f"would be refused: {complaint}" in done.stderr
        assert f"#SBATCH --output={tmp_path}/run/logs/slurm-%j.out" in done.stdout.splitlines()
        assert f"#SBATCH --nodes={4 if '--nodes' in arguments else 1}" in done.stdout.splitlines()


def test_runs_dir_is_the_parent_of_the_new_directory(tmp_path: Path) -> None:
    for name, setting in (("pretrain-tiny", "runs_dir"), ("pipeline-tiny", "all.runs_dir")):
        done = dry_run("--config-name", name, f"{setting}={tmp_path}/mine")
        assert done.returncode == 0, done.stderr
        assert f"cd {tmp_path}/mine/{name}-" in done.stdout
    one = dry_run("--config-name", "pretrain-tiny", f"run_dir={tmp_path}/one")
    assert f"cd {tmp_path}/one/code" in one.stdout
    stage = dry_run("--config-name", "pipeline-tiny", "sft.runs_dir=elsewhere")
    assert "sft" in stage.stderr
    assert "has no effect here" in stage.stderr


@pytest.mark.parametrize(
    ("tool", "complaint"),
    [
        ('[tools/convert_hf.py, export, "{from}"]', "the following arguments are required: --output"),
        ('[tools/convert_hf.py, export, "{from}", --output, x, --dtype, fp31]', "invalid choice: 'fp31'"),
        ('[tools/convert_hf.py, export, "{from}", --output, x, --like, /nowhere]', "--like /nowhere: no such folder"),
        ('[tools/convert_hf.py, export, "{from}", --output, x, --model-type, llama]', "model_type='llama'"),
        ('[tools/convert_hf.py, export, "{from}", --output, x, --model-type, qwen3_5_moe]', "--like with the folder"),
        ("[tools/no_such_tool.py]", "no_such_tool.py does not exist"),
    ],
)
def test_a_tool_that_cannot_work_is_refused_before_the_training(tmp_path: Path, tool: str, complaint: str) -> None:
    chain = f"stages: {{pretrain: {{recipe: pretrain-tiny}}, last: {{tool: {tool}, from: pretrain}}}}"
    (tmp_path / "pipeline-chain.yaml").write_text(chain)
    done = dry_run("--config-name", "pipeline-chain", "--config-dir", str(tmp_path))
    assert done.returncode == 2
    assert "stage last" in done.stderr
    assert complaint in done.stderr


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
        ({"environment": {"PGPASSWORD": "x"}}, "looks like a secret"),
        ({"environment": {"HTTPS_PROXY": "http://me:sesame@proxy:3128"}}, "the password in http"),
        ({"setup": ["export HF_TOKEN=abc"]}, "looks like a secret"),
        ({"sbatch_arguments": ["--export=ALL,WANDB_API_KEY=abc"]}, "sbatch_arguments sets WANDB_API_KEY"),
        ({"sbatch_arguments": ["--export", "ALL,HF_TOKEN=abc"]}, "sbatch_arguments sets HF_TOKEN"),
        ({"srun_arguments": ["--export=ALL,A=b,API_KEY_2='a b'"]}, "srun_arguments sets API_KEY_2"),
        ({"srun_arguments": ["--auth-token", "abc"]}, "srun_arguments sets auth-token"),
        ({"partitoin": "gpu"}, "partitoin"),
        ({"time": "tomorrow"}, "hours:minutes:seconds"),
        ({"launcher": "mpirun"}, "launcher"),
    ],
)
def test_an_invalid_site_is_rejected(site: Callable[..., str], changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_site(site(**changes))


def test_settings_that_hold_no_secret_are_accepted(site: Callable[..., str]) -> None:
    changes = {
        "environment": {"TOKENIZERS_PARALLELISM": "false", "NUM_TOKENS": "5", "WANDB_API_KEY": "$SAVED_KEY"},
        "setup": ["export HF_TOKEN=$(cat ~/.token)", 'export WANDB_API_KEY="$(<keyfile)"', "module load keyutils=1"],
        "sbatch_arguments": ["--export=ALL,WANDB_API_KEY", "--comment=a=b"],
        "srun_arguments": ["--container-mounts=/a:/b,/key:/key"],
    }
    assert load_site(site(**changes)).environment == changes["environment"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1, 2]", "holds a list"),
        ("gpu", "holds a str"),
        ("a: [", "is not valid YAML"),
        ("time: 1\ntime: 2", "'time' is given twice"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
    ],
)
def test_a_site_file_that_is_no_mapping_is_rejected(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=complaint):
        load_site(str(path))


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
