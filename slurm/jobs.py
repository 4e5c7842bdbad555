"""Calls of sbatch and squeue."""

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
