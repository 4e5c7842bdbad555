"""What the launcher (torchrun, srun, or nobody) says about this process, before any process group exists."""

import os


def world_size() -> int:
    """Return the number of processes of the run."""
    return _number("WORLD_SIZE", "SLURM_NTASKS", 1)


def rank() -> int:
    """Return this process's number; 0 is the leader."""
    return _number("RANK", "SLURM_PROCID", 0)


def local_rank() -> int:
    """Return this process's number on its own machine."""
    return _number("LOCAL_RANK", "SLURM_LOCALID", 0)


def node_name() -> str | None:
    """Return the scheduler's name of this machine, if there is one."""
    return os.environ.get("SLURMD_NODENAME")


def has_neighbours() -> bool:
    """Whether a launcher gave this process a place to meet others."""
    return "MASTER_ADDR" in os.environ and world_size() >= 1


def _number(torchrun: str, slurm: str, alone: int) -> int:
    # Slurm sets its variables in a batch script too; only a task started by srun, with a rendezvous, is one of many.
    if torchrun in os.environ:
        return int(os.environ[torchrun])
    if "MASTER_ADDR" in os.environ and "SLURM_STEP_ID" in os.environ:
        return int(os.environ.get(slurm, alone))
    return alone
