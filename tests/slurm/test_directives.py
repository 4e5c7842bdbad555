"""Job scripts: values that could add lines are rejected, and sbatch reads back every other value as it was."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.config import UserError, validate
from slurm.directives import check_folder, check_time, directive, output_pattern
from slurm.pipeline import Stage
from slurm.script import sbatch_script
from slurm.site import Site, load_site
from tests.slurm.cluster import Cluster
from tests.slurm.runs import ROOT, run_logs, submitted

# everything that a shell, sbatch, Hydra or OmegaConf could read as its own
ODD = "a b=c,d(e'f%jg[h#i${HOME}\"k"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
# writes the variables and arguments that the job has
REPORT = "import json, os, sys; json.dump([dict(os.environ), sys.argv], open(sys.argv[1], 'w'))"


@pytest.mark.parametrize(
    "changes",
    [
        {"partition": "a\n#SBATCH --uid=0"},
        {"account": "a\r"},
        {"qos": "a\x85b"},
        {"time": "1:00:00\n#SBATCH --reboot"},
        {"memory_per_node": "1G\n"},
        {"sbatch_arguments": ["--exclusive\n#SBATCH --reboot"]},
        {"srun_arguments": ["--mpi=none\n"]},
        {"python": "python\nreboot"},
        {"node_python": "python3\nreboot\n"},
        {"setup": ["module load a\n#SBATCH --reboot"]},
        {"environment": {"A=1\nreboot\nB": "x"}},
    ],
)
def test_a_site_cannot_add_lines(site: Callable[..., str], changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="site: "):
        load_site(site(**changes))


@pytest.mark.parametrize(
    "time", ["1:00\n#SBATCH --reboot", "", "soon", "-5", "12:", "1:2:3:4", "1e3", "٣", "24:00:00 "]
)
def test_a_time_limit_is_one_of_slurms(time: str) -> None:
    with pytest.raises(UserError, match="--time"):
        check_time(time, "--time")


def test_slurms_times_are_accepted() -> None:
    for time in ("90", "90:00", "1:30:00", "2-0", "1-12:30", "1-12:30:00", "UNLIMITED", "infinite"):
        assert check_time(time, "--time") == time


@pytest.mark.parametrize("name", ["a\nb", "a:b", "a\\b"])
def test_folders_that_no_script_can_name_are_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="run directory: "):
        check_folder(tmp_path / name, "run directory")


def test_every_line_of_a_script_is_one_of_ours(tmp_path: Path) -> None:
    """Multi-line values of variables are quoted, and stay behind the directives."""
    stage = Stage("x", tmp_path / ODD, tmp_path / "code", validate({}))
    lines = sbatch_script(stage, Site(environment={"A": "b\n#SBATCH --reboot"}, partition="a,b")).splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert not any("reboot" in line for line in lines[:first])
    assert "#SBATCH --partition=a,b" in lines


@pytest.mark.slurm
def test_sbatch_reads_every_value_back(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    options = (f"--job-name={ODD}", f"--comment={ODD}", f"--output={output_pattern(folder)}", "--partition=batch,high")
    script = tmp_path / "job.sbatch"
    script.write_text("\n".join(["#!/bin/bash", *map(directive, options), "pwd"]) + "\n")
    job = cluster.run("sbatch", "--parsable", str(script))
    assert cluster.wait(job, *ENDED) == "COMPLETED"
    assert [path.name for path in folder.iterdir()] == [f"slurm-{job}.out"]
    shown = cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--Format=Name:200")
    assert shown.strip() == ODD


def tool_pipeline(recipes: Path, output: Path) -> list[str]:
    """Write a pipeline of one tool, which reports its variables and arguments; return the options that select it."""
    recipes.mkdir(parents=True)
    tool = {"tool": ["-c", REPORT, str(output), "{run_dir}", '{"a": [1, {}]}']}
    (recipes / "pipeline-report.yaml").write_text(json.dumps({"stages": {"report": tool}}))
    return ["--config-name", "pipeline-report", "--config-dir", str(recipes)]


@pytest.mark.slurm
def test_jobs_run_in_an_odd_folder_with_odd_variables(
    cluster: Cluster, site: Callable[..., str], tmp_path: Path
) -> None:
    output, folder = tmp_path / ODD / "report.json", tmp_path / ODD / "chain"
    pipeline = tool_pipeline(tmp_path / ODD / "recipes", output)
    path = site(partition="batch,high", time="UNLIMITED", environment={"ODD": ODD + "\nsecond line"})
    (job,) = submitted(cluster, *pipeline, "--site", path, "--run-dir", str(folder))
    assert cluster.wait(job, *ENDED, seconds=60) == "COMPLETED", run_logs(folder / "report")
    assert (folder / "report" / "logs" / f"slurm-{job}.out").is_file()
    variables, arguments = json.loads(output.read_text())
    assert variables["ODD"] == ODD + "\nsecond line"
    assert arguments[2:] == [str(folder / "report"), '{"a": [1, {}]}']
    command = [sys.executable, "-m", "slurm.status", str(folder)]
    shown = subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, check=True)
    assert "done" in shown.stdout


@pytest.mark.slurm
def test_a_job_submitted_inside_a_job_is_independent_of_it(
    cluster: Cluster, site: Callable[..., str], tmp_path: Path
) -> None:
    output, folder = tmp_path / "report.json", tmp_path / "chain"
    command = [sys.executable, "-m", "slurm.submit", *tool_pipeline(tmp_path / "recipes", output)]
    step = [
        "srun",
        "--quiet",
        "--nodes=1",
        "--ntasks=1",
        "--cpus-per-task=1",
        "--cpu-bind=cores",
        "--time=5",
        "--chdir",
        str(ROOT),
    ]
    settings = site(setup=[f"env -0 > {tmp_path}/batch"], environment={"KEPT": "yes"})
    inside = cluster.run(*step, "env", f"PYTHONPATH={ROOT}", *command, "--site", settings, "--run-dir", str(folder))
    job = next(line.split()[1] for line in inside.splitlines() if line.startswith("job "))
    assert cluster.wait(job, *ENDED, seconds=60) == "COMPLETED", run_logs(folder / "report")
    variables = {line.partition("=")[0] for line in (tmp_path / "batch").read_text().split("\0")}
    assert {"SLURM_JOB_ID", "SLURM_CONF", "PATH"} <= variables
    of_a_step = {"SLURM_STEP_ID", "SLURM_SRUN_COMM_HOST", "SLURM_STEP_NUM_TASKS", "SLURM_CPU_BIND", "SLURM_UMASK"}
    assert not variables & of_a_step
    assert json.loads(output.read_text())[0]["SLURM_JOB_ID"] == job
