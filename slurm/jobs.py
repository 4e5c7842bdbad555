"""sbatch, squeue: the few calls of Slurm's programs that submitting and looking need."""

import shutil
import subprocess
from pathlib import Path

from megatron_q3n.config import UserError

ALIVE = {
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
    """Refuse early where there is no Slurm.

    Raises: UserError.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on PATH: submit from a machine of the cluster, look with --dry-run, or run "
            "here with --local."
        )


def submit(script: Path, after: str | None) -> str:
    """Submit a script, to begin once job `after` has ended well; return the job's id.

    Raises: UserError with what sbatch says.
    """
    command = ["sbatch", "--parsable"]
    if after is not None:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def states(job_ids: list[str]) -> dict[str, tuple[str, str]]:
    """Return {job id: (state, reason)} of the jobs that Slurm still knows; empty where there is no Slurm."""
    if not job_ids or shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(job_ids)}"]
    command.append("--format=%i|%T|%r")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [line.strip().split("|") for line in done.stdout.splitlines()]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def is_waiting_or_running(state: str) -> bool:
    """Say whether a job in this state will still do something."""
    return state in ALIVE
