"""Rank, world size and node of this process from the launcher's environment (torchrun, srun, or none).

Read before any process group exists.
"""

import os

from megatron_q3n.config.errors import UserError


def world_size() -> int:
    """Return the number of processes of the run (WORLD_SIZE, SLURM_NTASKS, or 1)."""
    return _number("WORLD_SIZE", "SLURM_NTASKS", 1)


def rank() -> int:
    """Return this process's global rank; rank 0 is the leader."""
    return _number("RANK", "SLURM_PROCID", 0)


def local_rank() -> int:
    """Return this process's rank on its machine."""
    return _number("LOCAL_RANK", "SLURM_LOCALID", 0)


def ranks_per_node() -> int | None:
    """Return the number of processes on this machine, None where the launcher does not say it (LOCAL_WORLD_SIZE)."""
    if world_size() == 1:
        return 1
    return _read("LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in os.environ else None


def node_name() -> str | None:
    """Return Slurm's name of this machine, or None."""
    return os.environ.get("SLURMD_NODENAME")


def job() -> tuple[str, int] | None:
    """Return the Slurm job of this process and how often it was requeued, or None."""
    job_id = os.environ.get("SLURM_JOB_ID")
    return (job_id, int(os.environ.get("SLURM_RESTART_COUNT", 0))) if job_id else None


def has_rendezvous() -> bool:
    """Return whether a launcher set a rendezvous address (MASTER_ADDR) for this process."""
    return "MASTER_ADDR" in os.environ and world_size() >= 1


def _number(torchrun: str, slurm: str, default: int) -> int:
    # Slurm sets its variables in a batch script too; only a task started by srun, with a rendezvous, has a rank
    if torchrun in os.environ:
        return _read(torchrun, default)
    if "MASTER_ADDR" in os.environ and "SLURM_STEP_ID" in os.environ and slurm in os.environ:
        return _read(slurm, default)
    return default


def _read(name: str, least: int) -> int:
    """Return the number in a variable, at least the default: one process, rank 0."""
    text = os.environ[name]
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UserError(
            f"environment variable {name}={text!r}: a launcher (torchrun, srun) sets a whole number of {least} or "
            "more. Unset it to run one process."
        )
    return int(text)
