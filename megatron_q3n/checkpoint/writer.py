"""Saving: a snapshot on the training thread, the writing behind its back, and one rename that makes it a checkpoint.

A save has three parts. `begin` plans it with the other processes and copies to host memory what the
next step will change. `write`, in a thread of each process, writes that process's files, reads them
back for their digests, and verifies a share of the older checkpoints that will count once this one is
there. `finish`, with the other processes again, writes megatron-core's metadata and our sealed
description, renames the folder into place and prunes. A kill before the rename leaves the older
checkpoints as they were.

A thread, and not megatron-core's forked process (`async_strategy="mcore"`), because a killed run's
fork lives on and writes into the folder of the run that replaces it; because a fork of a process with
a GPU and many threads is fragile; and because its results come back over a process spawned for them,
which imports the main module again. Writing and hashing release Python's lock.
"""

import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_q3n.checkpoint import content, folders, integrity
from megatron_q3n.checkpoint.reader import gathered
from megatron_q3n.config import UserError
from megatron_q3n.training.state import TrainState

# Bucket of megatron-core's writer: (path, name, (bytes items, tensor items))
Bucket = tuple[str, str, tuple[list[Any], list[Any]]]


@dataclass
class _Written:
    """One process's part of a save."""

    results: list[Any] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    damage: dict[Path, list[str]] = field(default_factory=dict)
    problem: str = ""


class _Planned(TorchDistSaveShardedStrategy):
    """megatron-core's planning, stopped where the writing would begin."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, async_strategy: str) -> Any:
        self.writer = writer
        _, self.metadata, _ = planned
        return super()._get_save_and_finalize_callbacks(writer, planned, async_strategy)


@dataclass
class _Save:
    """A save in progress."""

    final: Path
    partial: Path
    description: dict[str, Any]
    plan: _Planned
    counted: list[Path]
    superfluous: list[Path]
    written: "Future[_Written]" = field(default_factory=Future)


class Saver:
    """Saves one run's checkpoints, at most one at a time; with `checkpoint.asynchronous` behind the training.

    Every process calls every method, in the same order.
    """

    def __init__(self, state: TrainState, run_dir: Path, note: Callable[[str], None] = print) -> None:
        """Save `state` into `run_dir`; `note` is told of what the user should know."""
        self._state, self._run_dir, self._note = state, run_dir, note
        self._active: _Save | None = None
        self._complete: list[int] = []

    def save(self) -> Path:
        """Save the present state, and return where it will stand.

        It stands there when `settle` has returned its step; the state may change at once.
        Raises: UserError on a full or read-only disk; older checkpoints are untouched then.
        """
        self._finish_active(wait=True)
        self._active = save = _begin(self._state, self._run_dir)
        if self._state.config.checkpoint.asynchronous:
            buckets = _snapshot(self._state, save.plan.writer.write_buckets, copy=True)
            threading.Thread(target=_write, args=(self._state, save, buckets), name="checkpoint").start()
        else:
            _write(self._state, save, _snapshot(self._state, save.plan.writer.write_buckets, copy=False))
            self._finish_active(wait=True)
        return save.final

    def settle(self, wait: bool) -> list[int]:
        """Return the steps whose checkpoints became complete since the last call; with `wait`, all that were begun.

        Raises: UserError if one could not be written.
        """
        self._finish_active(wait=wait)
        complete, self._complete = self._complete, []
        return complete

    def _finish_active(self, *, wait: bool) -> None:
        save, group = self._active, self._state.parallel
        if save is None or (not wait and group.any(not save.written.done())):
            return
        self._active = None
        for message in _finish(self._state, self._run_dir, save, save.written.result()):
            self._note(message)
        self._complete.append(save.description["step"])


def save(state: TrainState, run_dir: Path) -> Path:
    """Save everything a resume needs, atomically, wait until it stands, and prune older checkpoints.

    Raises: UserError on a full or read-only disk; older checkpoints are untouched then.
    """
    saver = Saver(state, run_dir)
    place = saver.save()
    saver.settle(True)
    return place


def _begin(state: TrainState, run_dir: Path) -> _Save:
    """Make room and plan with the other processes which of them writes what."""
    final = (run_dir / folders.FOLDER / folders.step_name(state.step)).resolve()
    # a name nobody else has: a process of a killed run that still lives must not write into this save
    token = state.parallel.from_leader(secrets.token_hex(4))
    partial = final.with_name(f".{final.name}.{token}.partial")
    problem = ""
    try:
        if state.parallel.is_leader:
            final.parent.mkdir(parents=True, exist_ok=True)
            folders.sweep(final.parent)
            partial.mkdir()
            _check_space(partial, state)
    except OSError as error:
        problem = str(error)
    _agree(state, final, problem, partial)
    # otherwise megatron-core spawns a process for a queue that nothing here uses
    filesystem_async._results_queue = queue.Queue()
    plan = _Planned()
    dist_checkpointing.save(
        content.sharded(state, loading=False), str(partial), plan, async_sharded_save=True, async_strategy="mcore"
    )
    counted, superfluous = _retention(state, run_dir, final)
    return _Save(final, partial, _description(state), plan, counted, superfluous)


def _retention(state: TrainState, run_dir: Path, final: Path) -> tuple[list[Path], list[Path]]:
    """Return which older checkpoints will count as kept and which may go, once `final` is there.

    Those that count are verified first: an older good one is never given up for a newer bad one.
    """
    settings, leader = state.config.checkpoint, state.parallel.is_leader
    found = gathered(state.parallel, _older(run_dir, final, settings) if leader else None)
    return found[0]


def _older(run_dir: Path, final: Path, settings: Any) -> tuple[list[Path], list[Path]]:
    complete = [path for path in folders.complete(run_dir) if path.name != final.name]
    going = folders.superfluous(complete, settings.keep_last - 1, settings.keep_every_steps)
    return (complete[: settings.keep_last - 1] if going else []), going


def _snapshot(state: TrainState, buckets: list[Bucket], *, copy: bool) -> list[Bucket]:
    """Bring this process's tensors to host memory; with `copy`, those that are there too, for the next
    step will change them."""

    def on_host(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda:
            return tensor.to("cpu", non_blocking=True)
        return tensor.clone() if copy else tensor

    here: list[Bucket] = [
        (path, name, (plain, [(item, on_host(tensor)) for item, tensor in tensors]))
        for path, name, (plain, tensors) in buckets
    ]
    state.device.synchronize()
    return here


def _write(state: TrainState, save: _Save, buckets: list[Bucket]) -> None:
    """Write, digest and verify, and leave the outcome in `save.written`; runs in a thread, talks to nobody."""
    written = _Written()
    group, verify = state.parallel, state.config.checkpoint.verify
    try:
        for index, bucket in enumerate(buckets):
            _, outcome = filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                [save.plan.writer.transforms],
                local_proc_idx=index,
                write_bucket=bucket,
                results_queue=None,
                count_queue=None,
                use_fsync=True,
            )
            if isinstance(outcome, Exception):
                raise outcome
            written.results += outcome
        written.digests = integrity.digests(save.partial, [name for _, name, _ in buckets])
        for old in save.counted:
            found = integrity.damage(old, verify, group.rank, group.world_size)
            written.damage[old] = found
    except Exception as error:  # torch wraps a full disk in types of its own; the save is void
        written.problem = f"{type(error).__name__}: {_root_cause(error)}"
    save.written.set_result(written)


def _finish(state: TrainState, run_dir: Path, save: _Save, own: _Written) -> list[str]:
    """Make a written save a checkpoint and prune; return what the user should know."""
    everyone: list[_Written] = gathered(state.parallel, own)
    problem = next((part.problem for part in everyone if part.problem), "")
    notes: list[str] = []
    if state.parallel.is_leader and not problem:
        try:
            _publish(save, everyone)
            notes = _prune(save, everyone)
        except OSError as error:
            problem = str(error)
    _agree(state, save.final, problem, save.partial)
    return notes


def _publish(save: _Save, everyone: list[_Written]) -> None:
    """Write what describes the files, then give the folder its name."""
    save.plan.writer.finish(save.plan.metadata, [part.results for part in everyone])
    save_config(CheckpointingConfig(save.plan.backend, save.plan.version), str(save.partial))
    known = {name: value for part in everyone for name, value in part.digests.items()}
    integrity.seal(save.partial, save.description, known)
    folders.publish(save.partial, save.final)


def _prune(save: _Save, everyone: list[_Written]) -> list[str]:
    """Delete what is superfluous, unless one of those that were to be kept is damaged."""
    notes = []
    for old in save.counted:
        found = [problem for part in everyone for problem in part.damage.get(old, [])]
        if found:
            aside = folders.set_aside(old)
            notes.append(
                f"checkpoint {old.name} is damaged: {'; '.join(dict.fromkeys(found))}; kept as {aside.name}, "
                "and no older checkpoint is deleted this time"
            )
    try:
        if not notes:
            folders.discard(save.superfluous)
    except OSError as error:
        notes.append(f"an old checkpoint could not be deleted: {error}")
    return notes


def _description(state: TrainState) -> dict[str, Any]:
    config = state.config
    return {
        "step": state.step,
        "tokens": state.tokens,
        "skipped_steps": state.skipped_steps,
        "world_size": state.parallel.world_size,
        "layout": config.parallel.model_dump(mode="json"),
        "precision": config.precision.model_dump(mode="json"),
        "saved_at": time.time(),
        "model": config.model.model_dump(mode="json"),
    }


def _check_space(folder: Path, state: TrainState) -> None:
    """Refuse early what cannot fit: parameters in their format, master copy and two moments in fp32."""
    weights = [p for model in state.models for p in model.parameters()]
    here = sum(p.numel() * (p.element_size() + 12) for p in weights)
    needed = here * state.parallel.world_size // max(1, state.parallel.data_size)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{free / 2**30:.2f} GiB free, about {needed / 2**30:.2f} GiB needed")


def _agree(state: TrainState, final: Path, problem: str, partial: Path) -> None:
    """Let every rank fail together if one could not write."""
    if not state.parallel.any(bool(problem)):
        return
    if state.parallel.is_leader:
        shutil.rmtree(partial, ignore_errors=True)
    kept = folders.newest_in(final.parent.parent)
    raise UserError(
        f"checkpoint {final} could not be written: {problem or 'another rank failed'}. "
        + (f"The last good checkpoint is {kept}. " if kept else "There is no earlier checkpoint. ")
        + "Free space or make the folder writable, then resume."
    )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}"
