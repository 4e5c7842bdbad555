"""Preparation of a run before torch is imported: what can be refused or completed by reading files alone."""

from pathlib import Path
from typing import Any

from megatron_q3n import checkpoint
from megatron_q3n.config import RunConfig, UserError, launch
from megatron_q3n.data.run_inputs import InputRecord, check_same_inputs

# they read a checkpoint, and have no run directory of their own
WITHOUT_RUN_DIRECTORY = ("generate", "serve", "evaluate")


def prepare(config: RunConfig) -> RunConfig:
    """Return the configuration with its start checkpoint found, after checking what a resumed run goes on with.

    Raises: UserError for a checkpoint that does not exist, or data that changed since the run began.
    """
    if config.stage in WITHOUT_RUN_DIRECTORY:
        return with_start(config, _found(config))
    run_dir = Path(config.run_dir) if config.run_dir is not None else None
    if run_dir is None or checkpoint.newest_in(run_dir) is None:
        if config.data.accept_changed_contents:
            raise UserError(
                "data.accept_changed_contents=true has no effect on a new run, which has no contents to compare; "
                "set it to false."
            )
        return with_start(config, _found(config))
    # the leader alone reads the files: its exit ends the other processes
    if launch.rank() == 0:
        check_same_inputs(run_dir, config)
    record = InputRecord.read(run_dir)
    return with_start(config, record.start_checkpoint) if record is not None else config


def with_start(config: RunConfig, start: str | None) -> RunConfig:
    """Return the configuration with another `checkpoint.load`."""
    section: Any = config.checkpoint.model_copy(update={"load": start})
    return config.model_copy(update={"checkpoint": section})


def _found(config: RunConfig) -> str | None:
    """Return the very checkpoint that `checkpoint.load` leads to, as a run's newest one changes while it goes on."""
    return None if config.checkpoint.load is None else str(checkpoint.find(config.checkpoint.load))
