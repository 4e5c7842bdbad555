"""Asynchronous checkpoint writer: a snapshot on the training thread, writing in a background thread, an atomic rename.

A save has three parts. `_begin` plans it with the other processes. `_snapshot` copies the tensors that the next step
changes to host memory. `_write`, in a thread of each process, writes that process's files, reads them back for their
checksums, and verifies a share of the older checkpoints that retention will keep. `_finish`, with the other processes
again, writes megatron-core's metadata and our manifest, renames the folder into place and prunes. A kill before the
rename leaves the older checkpoints unchanged.

A thread, and not megatron-core's forked process (`async_strategy="mcore"`): the fork of a killed run survives and
writes into the folder of the run that replaces it; a fork of a process with a GPU and many threads is fragile; and its
results come back over a spawned process, which imports the main module again. Writing and hashing release Python's GIL.
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

from megatron_q3n.checkpoint import completed, folders, integrity, state_dict
from megatron_q3n.checkpoint.reader import gather_objects
from megatron_q3n.config import UserError
from megatron_q3n.training.state import TrainState

# Bucket of megatron-core's writer: (path, name, (bytes items, tensor items))
Bucket = tuple[str, str, tuple[list[Any], list[Any]]]


@dataclass
class _WriteResult:
    """Result of one process's part of a save."""

    results: list[Any] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    damage: dict[Path, list[str]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    problem: str = ""


class _PlanOnlyStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's save strategy, which plans the save and does not start writing."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, async_strategy: str) -> Any:
        self.writer = writer
        _, self.metadata, _ = planned
        return super()._get_save_and_finalize_callbacks(writer, planned, async_strategy)


@dataclass
class _PendingSave:
    """A save in progress; `retained` older checkpoints are verified before `prunable` ones are deleted."""

    final: Path
    partial: Path
    manifest_fields: dict[str, Any]
    plan: _PlanOnlyStrategy
    retained: list[Path]
    prunable: list[Path]
    written: "Future[_WriteResult]" = field(default_factory=Future)


class Saver:
    """Saver of one run's checkpoints, at most one save at a time; with `checkpoint.asynchronous` in the background.

    Collective calls: every process calls every method, in the same order.
    """

    def __init__(self, state: TrainState, run_dir: Path, note: Callable[[str], None] = print) -> None:
        """Save `state` into `run_dir`; `note` receives messages for the user."""
        self._state, self._run_dir, self._note = state, run_dir, note
        self._pending: _PendingSave | None = None
        self._complete_steps: list[int] = []

    def save(self) -> Path:
        """Save the state and return the path of the checkpoint.

        The checkpoint is complete when `wait_for_save` has returned its step; the state may change at once.
        Raises: UserError on a full or read-only disk; older checkpoints are unchanged then.
        """
        self._finish_pending(wait=True)
        self._pending = save = _begin(self._state, self._run_dir)
        if self._state.config.checkpoint.asynchronous:
            buckets = _snapshot(self._state, save.plan.writer.write_buckets, copy=True)
            threading.Thread(target=_write, args=(self._state, save, buckets), name="checkpoint").start()
        else:
            _write(self._state, save, _snapshot(self._state, save.plan.writer.write_buckets, copy=False))
            self._finish_pending(wait=True)
        return save.final

    def wait_for_save(self, wait: bool) -> list[int]:
        """Return the steps whose checkpoints became complete since the last call.

        With `wait`, a pending save is completed first; without, it is only completed if all processes have written.
        Raises: UserError if a checkpoint could not be written.
        """
        self._finish_pending(wait=wait)
        steps, self._complete_steps = self._complete_steps, []
        return steps

    def _finish_pending(self, *, wait: bool) -> None:
        save, group = self._pending, self._state.parallel
        if save is None or (not wait and group.any(not save.written.done())):
            return
        self._pending = None
        for message in _finish(self._state, self._run_dir, save, save.written.result()):
            self._note(message)
        self._complete_steps.append(save.manifest_fields["step"])


def save(state: TrainState, run_dir: Path) -> Path:
    """Save everything that a resume needs, wait until the checkpoint is complete, and prune older checkpoints.

    Returns: the path of the checkpoint.
    Raises: UserError on a full or read-only disk; older checkpoints are unchanged then.
    """
    saver = Saver(state, run_dir)
    path = saver.save()
    saver.wait_for_save(True)
    return path


def _begin(state: TrainState, run_dir: Path) -> _PendingSave:
    """Create the partial folder and plan, with the other processes, the tensors that each of them writes."""
    final = (run_dir / folders.FOLDER / folders.step_name(state.step)).resolve()
    # a unique name: a process of a killed run that is still alive must not write into this save
    token = state.parallel.from_leader(secrets.token_hex(4))
    partial = final.with_name(f".{final.name}.{token}.partial")
    problem = ""
    try:
        if state.parallel.is_leader:
            final.parent.mkdir(parents=True, exist_ok=True)
            folders.remove_leftovers(final.parent)
            partial.mkdir()
            _check_space(partial, state)
    except OSError as error:
        problem = str(error)
    _raise_if_any_failed(state, final, problem, partial)
    # otherwise megatron-core spawns a process for a queue that is not used here
    filesystem_async._results_queue = queue.Queue()
    plan = _PlanOnlyStrategy()
    dist_checkpointing.save(
        state_dict.sharded_state_dict(state, loading=False),
        str(partial),
        plan,
        async_sharded_save=True,
        async_strategy="mcore",
    )
    retained, prunable = _plan_retention(state, run_dir, final)
    return _PendingSave(final, partial, _manifest_fields(state), plan, retained, prunable)


def _plan_retention(state: TrainState, run_dir: Path, final: Path) -> tuple[list[Path], list[Path]]:
    """Return the older checkpoints that are retained, and those to delete, once `final` is complete.

    The retained ones are verified first: an intact older checkpoint is never deleted for a damaged newer one.
    """
    settings, is_leader = state.config.checkpoint, state.parallel.is_leader
    plans = gather_objects(state.parallel, _older_checkpoints(run_dir, final, settings) if is_leader else None)
    return plans[0]


def _older_checkpoints(run_dir: Path, final: Path, settings: Any) -> tuple[list[Path], list[Path]]:
    complete = [path for path in folders.complete_checkpoints(run_dir) if path.name != final.name]
    prunable = folders.prunable(complete, settings.keep_last - 1, settings.keep_every_steps)
    return (complete[: settings.keep_last - 1] if prunable else []), prunable


def _snapshot(state: TrainState, buckets: list[Bucket], *, copy: bool) -> list[Bucket]:
    """Return this process's buckets with their tensors in host memory.

    With `copy`, host tensors are cloned too, since the next step changes them.
    """

    def on_host(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda:
            return tensor.to("cpu", non_blocking=True)
        return tensor.clone() if copy else tensor

    on_host_buckets: list[Bucket] = [
        (path, name, (plain, [(item, on_host(tensor)) for item, tensor in tensors]))
        for path, name, (plain, tensors) in buckets
    ]
    state.device.synchronize()
    return on_host_buckets


def _write(state: TrainState, save: _PendingSave, buckets: list[Bucket]) -> None:
    """Write the files, compute their checksums, verify older checkpoints, and set `save.written`.

    Runs in a background thread; makes no collective calls.
    """
    written = _WriteResult()
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
        for checkpoint in save.retained:
            try:
                written.damage[checkpoint] = integrity.find_damage(checkpoint, verify, group.rank, group.world_size)
            except integrity.UnreadableFileError as error:
                written.unreadable.append(str(error))
    # torch wraps the OSError of a full disk in several exception types; whatever it is, the save failed
    except Exception as error:
        written.problem = f"{type(error).__name__}: {_root_cause(error)}"
    save.written.set_result(written)


def _finish(state: TrainState, run_dir: Path, save: _PendingSave, local: _WriteResult) -> list[str]:
    """Publish a written save as a checkpoint and prune; return messages for the user."""
    results: list[_WriteResult] = gather_objects(state.parallel, local)
    problem = next((result.problem for result in results if result.problem), "")
    notes: list[str] = []
    if state.parallel.is_leader and not problem:
        try:
            _publish(save, results)
            completed.record(run_dir, save.final)
            notes = _prune(save, results)
        except OSError as error:
            problem = str(error)
    _raise_if_any_failed(state, save.final, problem, save.partial)
    return notes


def _publish(save: _PendingSave, results: list[_WriteResult]) -> None:
    """Write metadata and manifest, then rename the folder to its final name."""
    save.plan.writer.finish(save.plan.metadata, [result.results for result in results])
    save_config(CheckpointingConfig(save.plan.backend, save.plan.version), str(save.partial))
    known = {name: value for result in results for name, value in result.digests.items()}
    integrity.write_manifest(save.partial, save.manifest_fields, known)
    folders.publish(save.partial, save.final)


def _prune(save: _PendingSave, results: list[_WriteResult]) -> list[str]:
    """Delete the prunable checkpoints, unless a retained one is damaged or unreadable; return messages for the user."""
    unreadable = dict.fromkeys(message for result in results for message in result.unreadable)
    notes = [f"{message} No older checkpoint is deleted this time." for message in unreadable]
    for old in save.retained:
        problems = [problem for result in results for problem in result.damage.get(old, [])]
        if problems:
            renamed = folders.mark_damaged(old)
            notes.append(
                f"checkpoint {old.name} is damaged: {'; '.join(dict.fromkeys(problems))}; kept as {renamed.name}, "
                "and no older checkpoint is deleted this time"
            )
    try:
        if not notes:
            folders.delete(save.prunable)
    except OSError as error:
        notes.append(f"an old checkpoint could not be deleted: {error}")
    return notes


def _manifest_fields(state: TrainState) -> dict[str, Any]:
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
    """Raise OSError if the checkpoint exceeds the free space: parameters in their dtype, fp32 master and moments."""
    weights = [p for model in state.models for p in model.parameters()]
    local_bytes = sum(p.numel() * (p.element_size() + 12) for p in weights)
    needed = local_bytes * state.parallel.world_size // max(1, state.parallel.data_size)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{free / 2**30:.2f} GiB free, about {needed / 2**30:.2f} GiB needed")


def _raise_if_any_failed(state: TrainState, final: Path, problem: str, partial: Path) -> None:
    """Raise UserError on every rank if any rank could not write."""
    if not state.parallel.any(bool(problem)):
        return
    if state.parallel.is_leader:
        shutil.rmtree(partial, ignore_errors=True)
    newest = folders.newest_in(final.parent.parent)
    raise UserError(
        f"checkpoint {final} could not be written: {problem or 'another rank failed'}. "
        + (f"The last good checkpoint is {newest}. " if newest else "There is no earlier checkpoint. ")
        + "Free space or make the folder writable, then resume."
    )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}"
