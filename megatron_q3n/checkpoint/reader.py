"""Loading of checkpoints: selection of the newest intact one, verification, and restoring of the training state."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_q3n.checkpoint import completed, folders, integrity, state_dict
from megatron_q3n.checkpoint.architecture import check_architecture
from megatron_q3n.checkpoint.loading import load_sharded
from megatron_q3n.config import UserError
from megatron_q3n.parallel import Parallel
from megatron_q3n.training.state import TrainState


@dataclass
class Resumed:
    """Checkpoint that a run was resumed from, None for a new run; `notes` are messages for the user."""

    checkpoint: Path | None
    notes: list[str] = field(default_factory=list)


def resume(state: TrainState, run_dir: Path) -> Resumed:
    """Load the newest intact checkpoint of a run, skipping damaged ones with a warning.

    Damaged checkpoints are renamed `….damaged` once an intact one is found. A collective call.
    Raises: UserError if there are checkpoints and all are damaged, or if there were and all are gone: a new training
        would write into the directory of a trained model.
    """
    completed.check_not_lost(run_dir)
    skipped: list[tuple[Path, list[str]]] = []
    for checkpoint in _list_checkpoints(state.parallel, run_dir):
        problems = find_damage_on_all_ranks(state.parallel, state.config.checkpoint.verify, checkpoint)
        if not problems:
            notes = _mark_skipped(state.parallel, skipped, checkpoint)
            notes += _update_record(state.parallel, run_dir, checkpoint)
            _restore(state, checkpoint, resume=True, with_optimizer=True)
            return Resumed(checkpoint, notes)
        skipped.append((checkpoint, problems))
    renamed = state.parallel.from_leader(", ".join(path.name for path in folders.list_damaged(run_dir)))
    if skipped or renamed:
        causes = [problem for _, problems in skipped for problem in problems]
        raise UserError(
            f"{run_dir / folders.FOLDER} has no good checkpoint to resume from: "
            + "; ".join(causes or [f"only damaged ones are left ({renamed})"])
            + ". Restore one from a copy, or start a new run in another run_dir."
        )
    return Resumed(None)


def load(state: TrainState, checkpoint: Path, *, resume: bool, with_optimizer: bool = True) -> None:
    """Verify a checkpoint, then load its weights, and with `resume` also the step and the random generators.

    A collective call.
    Raises: UserError if the checkpoint is damaged or of another architecture.
    """
    problems = find_damage_on_all_ranks(state.parallel, state.config.checkpoint.verify, checkpoint)
    if problems:
        raise UserError(f"{checkpoint} is damaged: " + "; ".join(problems) + ". Use another checkpoint.")
    _restore(state, checkpoint, resume=resume, with_optimizer=with_optimizer)


def describe(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest, after checking the sizes of its files; their contents are not read.

    Raises: UserError naming the missing, damaged or truncated files.
    """
    problems = integrity.find_damage(checkpoint, "sizes")
    if problems:
        raise UserError("; ".join(problems) + "; the checkpoint is damaged, use another.")
    return integrity.read_manifest(checkpoint)


def find_damage_on_all_ranks(group: Parallel, verify: integrity.Verify, checkpoint: Path) -> list[str]:
    """Return the problems that all processes find in their shares of the files; the same list on every process.

    Raises: UserError on every process if one of them cannot read a file.
    """
    local, unreadable = [], ""
    try:
        local = integrity.find_damage(checkpoint, verify, group.rank, group.world_size)
    except integrity.UnreadableFileError as error:
        unreadable = str(error)
    found: list[tuple[list[str], str]] = gather_objects(group, (local, unreadable))
    for _, message in found:
        if message:
            raise integrity.UnreadableFileError(message)
    return list(dict.fromkeys(problem for problems, _ in found for problem in problems))


def gather_objects(group: Parallel, value: Any) -> list[Any]:
    """Return every process's value, in the order of ranks (all-gather of Python objects)."""
    values: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def _list_checkpoints(group: Parallel, run_dir: Path) -> list[Path]:
    """Return the run's checkpoints, newest first, as listed by the leader."""
    names = group.from_leader(json.dumps([str(path) for path in folders.candidates(run_dir)]))
    return [Path(name) for name in json.loads(names)]


def _update_record(group: Parallel, run_dir: Path, checkpoint: Path) -> list[str]:
    """Record the checkpoint that the run continues from; return a message if a newer one is recorded and missing."""
    if not group.is_leader:
        return []
    note = completed.missing_newer(run_dir, checkpoint)
    try:
        completed.record(run_dir, checkpoint)
    except OSError as error:
        raise UserError(f"{run_dir / completed.RECORD} cannot be written ({error.strerror}).") from None
    return [note] if note else []


def _mark_skipped(group: Parallel, skipped: list[tuple[Path, list[str]]], intact: Path) -> list[str]:
    """Rename damaged checkpoints; return a message for each with its problems and the checkpoint used instead."""
    notes = []
    for damaged, problems in skipped:
        renamed = folders.mark_damaged(damaged).name if group.is_leader else "a damaged one"
        notes.append(
            f"checkpoint {damaged.name} is damaged: {'; '.join(problems)}; kept as {renamed}, "
            f"going back to {intact.name}"
        )
        if group.is_leader:
            print(f"warning: {notes[-1]}", file=sys.stderr)
    if skipped and group.is_leader:
        folders.point_latest(intact)
    return notes


def _restore(state: TrainState, checkpoint: Path, *, resume: bool, with_optimizer: bool) -> None:
    """Load a verified checkpoint."""
    manifest = integrity.read_manifest(checkpoint)
    if not integrity.has_digests(manifest) and state.parallel.is_leader:
        print(f"warning: {checkpoint} has no digests; only its files' sizes were verified", file=sys.stderr)
    check_architecture(manifest, state.config.model, checkpoint)
    template = state_dict.sharded_state_dict(state, loading=True, with_optimizer=with_optimizer)
    same_world = manifest["world_size"] == state.parallel.world_size
    if not (resume and same_world):
        template.pop("rng")
    loaded = load_sharded(template, checkpoint, state.parallel)
    for index, model in enumerate(state.models):
        model.load_state_dict(loaded[f"model{index}"], strict=False)
    if with_optimizer:
        state_dict.apply_run_settings(state, loaded["optimizer"])
        state.optimizer.load_state_dict(loaded["optimizer"])
        state_dict.separate_step_tensors(state)
    else:
        state.optimizer.reload_model_params()
    # with its moments the optimizer has new groups, which the schedule has not reached yet
    state.set_step(manifest["step"] if resume else state.step)
    if resume:
        state.skipped_steps = manifest["skipped_steps"]
        if same_world:
            _restore_rng_states(loaded["rng"], checkpoint)


def _restore_rng_states(states: Any, checkpoint: Path) -> None:
    try:
        state_dict.restore_rng_states(states)
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        raise UserError(f"{checkpoint} holds no states of random generators ({error}); use another.") from None
