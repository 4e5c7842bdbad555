"""Checkpoints through megatron-core's dist_checkpointing: complete or absent, found again, and bounded in number.

A checkpoint is written to a hidden folder, described by `checkpoint.json` (written last), and
renamed into place: what is named `step_0000200` is whole, wherever a kill struck. Its tensors are
keyed by parameter, not by rank, so any layout can read them. Data position and learning rate follow
from the step; the generators' states are kept per rank.
"""

import contextlib
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_q3n.config import ModelConfig, UserError
from megatron_q3n.training.optimizer import torch_adam_states
from megatron_q3n.training.state import TrainState

FOLDER, DESCRIPTION, LATEST = "checkpoints", "checkpoint.json", "latest"
FORMAT = 1
# what may differ between two models that share weights
_FREE = {
    "name", "backend", "max_position_embeddings", "rotary_base", "moe_aux_loss_coeff", "moe_z_loss_coeff",
    "moe_router_load_balancing_type", "mtp_loss_scaling_factor", "init_method_std", "embedding_init_method_std",
    "linear_chunk_size",
    "moe_router_normalized_init", "megatron",
}  # fmt: skip


def save(state: TrainState, run_dir: Path) -> Path:
    """Save everything a resume needs, atomically, then prune older checkpoints.

    Raises: UserError on a full or read-only disk; older checkpoints are untouched then.
    """
    final = run_dir / FOLDER / step_name(state.step)
    partial = final.with_name(f".{final.name}.partial")
    leader = state.parallel.is_leader
    problem = ""
    try:
        if leader:
            _make_empty(partial)
            _check_space(partial, state)
    except OSError as error:
        problem = str(error)
    _agree(state, final, problem, partial)
    try:
        dist_checkpointing.save(_sharded(state, loading=False, with_optimizer=True), str(partial))
    except (
        Exception,
        CheckpointException,
    ) as error:  # the writer wraps an OSError in its own types; whatever it was, the save is void
        problem = f"{type(error).__name__}: {_root_cause(error)}"
    _agree(state, final, problem, partial)
    if leader:
        _describe(partial, state)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _sync_folder(final.parent)
        _point_latest(final)
        _prune(final.parent, state)
    state.parallel.barrier()
    return final


def load(state: TrainState, checkpoint: Path, *, resume: bool, with_optimizer: bool = True) -> None:
    """Load weights, and with `resume` the step and the generators too.

    Raises: UserError if the checkpoint is incomplete or of another architecture.
    """
    description = describe(checkpoint)
    check_architecture(description, state.config.model, checkpoint)
    sharded = _sharded(state, loading=True, with_optimizer=with_optimizer)
    same_world = description["world_size"] == state.parallel.world_size
    if not (resume and same_world):
        sharded.pop("rng")
    loaded = dist_checkpointing.load(
        sharded, str(checkpoint), strict=StrictHandling.RAISE_UNEXPECTED
    )
    for index, model in enumerate(state.models):
        model.load_state_dict(loaded[f"model{index}"], strict=False)
    if with_optimizer:
        state.optimizer.load_state_dict(loaded["optimizer"])
        _separate_steps(state)
    else:
        state.optimizer.reload_model_params()
    if resume:
        state.set_step(description["step"])
        state.skipped_steps = description["skipped_steps"]
        if same_world:
            _restore_generators(loaded["rng"])


def describe(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's description and check that its files are there in full.

    Raises: UserError naming what is missing or cut short.
    """
    path = checkpoint / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{checkpoint} is not a complete checkpoint: it has no {DESCRIPTION}.")
    try:
        description = json.loads(path.read_text())
        files = description["files"]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); the checkpoint is damaged, use another."
        ) from None
    for name, size in files.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UserError(f"{file} {what}; the checkpoint is damaged, use another.")
    return description


def check_architecture(description: dict[str, Any], model: ModelConfig, checkpoint: Path) -> None:
    """Refuse a checkpoint whose weights do not fit this model, naming the settings that differ."""
    saved, wanted = description["model"], model.model_dump(mode="json")
    differ = [
        f"model.{name}: {saved.get(name)} there, {value} here"
        for name, value in wanted.items()
        if name not in _FREE and saved.get(name) != value
    ]
    if differ:
        raise UserError(
            f"{checkpoint} holds a model of another architecture: " + "; ".join(differ) + "."
        )


def find(path: str | Path) -> Path:
    """Return the checkpoint a path means: itself, or the newest complete one of a run directory.

    Raises: UserError if there is none.
    """
    given = Path(path)
    if (given / DESCRIPTION).is_file():
        return given.resolve()
    newest = newest_in(given)
    if newest is None:
        raise UserError(
            f"{path}: no checkpoint found. Give a run directory (one with {FOLDER}/step_*) or a checkpoint in it."
        )
    return newest


def newest_in(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run directory, if any."""
    complete = [p for p in (run_dir / FOLDER).glob("step_*") if (p / DESCRIPTION).is_file()]
    return max(complete, key=lambda p: p.name).resolve() if complete else None


def step_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step_{step:07d}"


def _sharded(state: TrainState, *, loading: bool, with_optimizer: bool) -> dict[str, Any]:
    metadata = {
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": state.parallel.groups.dp_cp,
    }
    models = {
        f"model{index}": model.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        for index, model in enumerate(state.models)
    }
    sharded: dict[str, Any] = dict(models)
    if with_optimizer:
        if loading:
            _prime_torch_adam(state)
        sharded["optimizer"] = state.optimizer.sharded_state_dict(
            models, is_loading=loading, metadata=metadata
        )
    sharded["rng"] = ShardedObject(
        "rng",
        None if loading else _generators(),
        (state.parallel.world_size,),
        (state.parallel.rank,),
    )
    return sharded


def _prime_torch_adam(state: TrainState) -> None:
    """Give torch's AdamW the `step` entry that megatron-core's loading expects (distrib_optimizer.py:838, :1223)."""
    for adam, parameter in torch_adam_states(state.optimizer):
        if not adam.state[parameter]:
            adam.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _separate_steps(state: TrainState) -> None:
    """Give each parameter a `step` tensor of its own: after loading they share one, counted once
    per parameter and step (distrib_optimizer.py:1027), which silently spoils Adam's bias
    correction."""
    for adam, parameter in torch_adam_states(state.optimizer):
        entry = adam.state.get(parameter)
        if entry:
            entry["step"] = torch.as_tensor(entry["step"], dtype=torch.float32).clone()


def _generators() -> dict[str, Any]:
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


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
    kept = newest_in(final.parent.parent)
    raise UserError(
        f"checkpoint {final} could not be written: {problem or 'another rank failed'}. "
        + (f"The last good checkpoint is {kept}. " if kept else "There is no earlier checkpoint. ")
        + "Free space or make the folder writable, then resume."
    )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}"


def _describe(folder: Path, state: TrainState) -> None:
    files = {
        str(p.relative_to(folder)): p.stat().st_size
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    description = {
        "format": FORMAT,
        "step": state.step,
        "tokens": state.tokens,
        "skipped_steps": state.skipped_steps,
        "world_size": state.parallel.world_size,
        "saved_at": time.time(),
        "model": state.config.model.model_dump(mode="json"),
        "files": files,
    }
    with (folder / DESCRIPTION).open("w") as file:
        json.dump(description, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _point_latest(final: Path) -> None:
    link = final.with_name(LATEST)
    fresh = final.with_name(f".{LATEST}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    fresh.symlink_to(final.name)
    os.replace(fresh, link)


def _prune(folder: Path, state: TrainState) -> None:
    """Delete leftovers of killed saves, and all but the newest and the milestones."""
    settings = state.config.checkpoint
    for leftover in folder.glob(".step_*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    steps = sorted(folder.glob("step_*"), key=lambda p: p.name)
    for old in steps[: -settings.keep_last]:
        every = settings.keep_every_steps
        if not (every and int(old.name.removeprefix("step_")) % every == 0):
            shutil.rmtree(old, ignore_errors=True)
