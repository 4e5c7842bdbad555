"""Loading: which checkpoint a run goes on from, verified before any weight is touched."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_q3n.checkpoint import content, folders, integrity
from megatron_q3n.checkpoint.architecture import check_architecture
from megatron_q3n.config import UserError
from megatron_q3n.parallel import Parallel
from megatron_q3n.training.state import TrainState


@dataclass
class Resumed:
    """What a run goes on from: a checkpoint, or None for a run without any; `notes` are for the user."""

    checkpoint: Path | None
    notes: list[str] = field(default_factory=list)


def resume(state: TrainState, run_dir: Path) -> Resumed:
    """Load the newest good checkpoint of a run, passing over damaged ones and saying so.

    A damaged checkpoint is renamed `….damaged` once a good one is found. A collective call.
    Raises: UserError if there are checkpoints and none is good: training from scratch into the
    directory of a trained model is nobody's wish.
    """
    passed_over: list[tuple[Path, list[str]]] = []
    for checkpoint in _listed(state.parallel, run_dir):
        problems = agreed_damage(state, checkpoint)
        if not problems:
            notes = _fall_back(state.parallel, passed_over, checkpoint)
            _restore(state, checkpoint, resume=True, with_optimizer=True)
            return Resumed(checkpoint, notes)
        passed_over.append((checkpoint, problems))
    kept_aside = state.parallel.from_leader(", ".join(path.name for path in folders.damaged_in(run_dir)))
    if passed_over or kept_aside:
        causes = [problem for _, problems in passed_over for problem in problems]
        raise UserError(
            f"{run_dir / folders.FOLDER} has no good checkpoint to resume from: "
            + "; ".join(causes or [f"only damaged ones are left ({kept_aside})"])
            + ". Restore one from a copy, or start a new run in another run_dir."
        )
    return Resumed(None)


def load(state: TrainState, checkpoint: Path, *, resume: bool, with_optimizer: bool = True) -> None:
    """Verify a checkpoint, then load its weights, and with `resume` the step and the generators too.

    A collective call. Raises: UserError if the checkpoint is damaged or of another architecture.
    """
    problems = agreed_damage(state, checkpoint)
    if problems:
        raise UserError(f"{checkpoint} is damaged: " + "; ".join(problems) + ". Use another checkpoint.")
    _restore(state, checkpoint, resume=resume, with_optimizer=with_optimizer)


def describe(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's description and check that its files are there in full; their contents are not read.

    Raises: UserError naming what is missing, damaged or cut short.
    """
    problems = integrity.damage(checkpoint, "sizes")
    if problems:
        raise UserError("; ".join(problems) + "; the checkpoint is damaged, use another.")
    return integrity.read(checkpoint)


def agreed_damage(state: TrainState, checkpoint: Path) -> list[str]:
    """Return what any process finds wrong in its share of the files; every process gets the same list."""
    group, verify = state.parallel, state.config.checkpoint.verify
    own = integrity.damage(checkpoint, verify, group.rank, group.world_size)
    return list(dict.fromkeys(problem for found in gathered(group, own) for problem in found))


def gathered(group: Parallel, value: Any) -> list[Any]:
    """Return every process's value, in the order of ranks."""
    values: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def _listed(group: Parallel, run_dir: Path) -> list[Path]:
    """Return the run's checkpoints as the leader sees them, newest first."""
    names = group.from_leader(json.dumps([str(path) for path in folders.candidates(run_dir)]))
    return [Path(name) for name in json.loads(names)]


def _fall_back(group: Parallel, passed_over: list[tuple[Path, list[str]]], good: Path) -> list[str]:
    """Set damaged checkpoints aside and say what was wrong and what is used instead."""
    notes = []
    for damaged, problems in passed_over:
        kept = folders.set_aside(damaged).name if group.is_leader else "a damaged one"
        notes.append(
            f"checkpoint {damaged.name} is damaged: {'; '.join(problems)}; kept as {kept}, going back to {good.name}"
        )
        if group.is_leader:
            print(f"warning: {notes[-1]}", file=sys.stderr)
    if passed_over and group.is_leader:
        folders.point_latest(good)
    return notes


def _restore(state: TrainState, checkpoint: Path, *, resume: bool, with_optimizer: bool) -> None:
    """Load a verified checkpoint."""
    description = integrity.read(checkpoint)
    if not integrity.is_sealed(description) and state.parallel.is_leader:
        print(f"warning: {checkpoint} has no digests; only its files' sizes were verified", file=sys.stderr)
    check_architecture(description, state.config.model, checkpoint)
    wanted = content.sharded(state, loading=True, with_optimizer=with_optimizer)
    same_world = description["world_size"] == state.parallel.world_size
    if not (resume and same_world):
        wanted.pop("rng")
    loaded = dist_checkpointing.load(wanted, str(checkpoint), strict=StrictHandling.RAISE_UNEXPECTED)
    for index, model in enumerate(state.models):
        model.load_state_dict(loaded[f"model{index}"], strict=False)
    if with_optimizer:
        content.adopt_schedule(state, loaded["optimizer"])
        state.optimizer.load_state_dict(loaded["optimizer"])
        content.mend_loaded_optimizer(state)
    else:
        state.optimizer.reload_model_params()
    if resume:
        state.set_step(description["step"])
        state.skipped_steps = description["skipped_steps"]
        if same_world:
            content.restore_generators(loaded["rng"])
