"""Calls of sbatch and squeue, and the environment in which they are made."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from megatron_q3n.config import UserError

ACTIVE_STATES = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "SUSPENDED",
    "STOPPED",
    "RESIZING",
    "SIGNALING",
    "COMPLETING",
    "STAGE_OUT",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
}


# of an enclosing job, its step and its launcher; what selects the cluster is kept
_OF_A_JOB = re.compile(
    r"(SLURM|SLURMD|SRUN|PMI|PMI2|PMIX|OMPI|TORCHELASTIC)_.*|GPU_DEVICE_ORDINAL|CUDA_VISIBLE_DEVICES"
    r"|ROCR_VISIBLE_DEVICES|MASTER_ADDR|MASTER_PORT|(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE"
)
_OF_THE_CLUSTER = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT"}


def leave_enclosing_job() -> None:
    """Remove the variables of a job in which this command runs from the environment; nothing outside a job.

    sbatch hands the environment to the new job, whose srun would take its shape and its CPUs from the enclosing job.
    """
    if "SLURM_JOB_ID" in os.environ:
        for name in set(os.environ) - _OF_THE_CLUSTER:
            if _OF_A_JOB.fullmatch(name):
                del os.environ[name]


def require_slurm() -> None:
    """Check that sbatch is installed.

    Raises: UserError if it is not on PATH.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on PATH: submit from a machine of the cluster, print the scripts with --dry-run, or run "
            "here with --local."
        )


def submit(script: Path, after: str | None) -> str:
    """Submit a script, to start after job `after` has completed successfully; return the job id.

    Raises: UserError with the message of sbatch.
    """
    command = ["sbatch", "--parsable"]
    if after is not None:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    result = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"sbatch rejected {script}: {result.stderr.strip()}")
    return result.stdout.strip().split(";")[0]


def states(job_ids: list[str]) -> dict[str, tuple[str, str]]:
    """Return {job id: (state, reason)} of the jobs in squeue; empty without Slurm."""
    if not job_ids or shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(job_ids)}"]
    command.append("--format=%i|%T|%r")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [line.strip().split("|") for line in result.stdout.splitlines()]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def is_active(state: str) -> bool:
    """Return whether a job in this state is pending, running or ending."""
    return state in ACTIVE_STATES
