"""The `checkpoints` folder of a run: names, the newest checkpoint, atomic replacement, deletion and pruning.

Each change is one atomic rename, so a kill at any moment leaves either the state before or the state after:

| name | content |
|---|---|
| `step_0000200` | a checkpoint |
| `step_0000200.damaged` | a checkpoint that failed verification, kept for inspection |
| `.step_0000200.<token>.partial` | a save in progress, or the remains of a killed one |
| `.step_0000200.replaced` | the previous checkpoint of the same step, until the new one has its name |
| `.step_0000200.discarded` | a checkpoint being deleted |
| `latest` | a symbolic link to the newest checkpoint |
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_q3n.checkpoint.integrity import has_manifest, sync_folder
from megatron_q3n.config import UserError

FOLDER, LATEST = "checkpoints", "latest"
_STEP = re.compile(r"step_(\d+)|\.step_(\d+)\.replaced")
_DAMAGED = re.compile(r"step_\d+\.damaged.*")


def step_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's folder name."""
    match = _STEP.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1] or match[2])


def candidates(run_dir: Path) -> list[Path]:
    """Return every checkpoint of a run, newest first, complete or not.

    One whose replacement was interrupted between two renames is returned under its `.replaced` name.
    Raises: UserError if the folder cannot be read; an empty list means that there is none, or that it is empty.
    """
    folder, names = _list(run_dir)
    steps = [folder / name for name in names if _STEP.fullmatch(name)]
    found = [path for path in steps if path.name.startswith("step_") or _original_path(path).name not in names]
    return sorted(found, key=step_of, reverse=True)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints that have a manifest, newest first; their files are not verified here."""
    return [path for path in candidates(run_dir) if has_manifest(path)]


def newest_in(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run directory, or None; its files are not verified here."""
    return next(iter(complete_checkpoints(run_dir)), None)


def find(path: str | Path) -> Path:
    """Return the checkpoint at a path, or the newest complete one of the run directory at that path.

    Raises: UserError if there is none.
    """
    folder = Path(path)
    if has_manifest(folder):
        return folder.resolve()
    newest = newest_in(folder)
    if newest is None:
        raise UserError(
            f"{path}: no checkpoint found. Give a run directory (one with {FOLDER}/step_*) or a checkpoint in it."
        )
    return newest


def list_damaged(run_dir: Path) -> list[Path]:
    """Return the checkpoints that were renamed as damaged."""
    folder, names = _list(run_dir)
    return sorted(folder / name for name in names if _DAMAGED.fullmatch(name))


def publish(partial: Path, final: Path) -> None:
    """Rename a complete folder to its final name, replacing a checkpoint of that name, and set the link `latest`."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(partial, final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    point_latest(final)


def point_latest(final: Path) -> None:
    """Set the link `latest` to this checkpoint, atomically."""
    temporary = final.with_name(f".{LATEST}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(final.name)
    os.replace(temporary, final.with_name(LATEST))


def mark_damaged(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint to `.damaged`, so that it is neither loaded nor deleted; return its new path."""
    original = _original_path(checkpoint)
    damaged, number = original.with_name(f"{original.name}.damaged"), 1
    while damaged.exists():
        number += 1
        damaged = original.with_name(f"{original.name}.damaged-{number}")
    os.replace(checkpoint, damaged)
    return damaged


def prunable(newest_first: list[Path], keep: int, keep_every_steps: int) -> list[Path]:
    """Return the checkpoints beyond the first `keep`, except those of every `keep_every_steps` steps."""
    return [old for old in newest_first[keep:] if not (keep_every_steps and step_of(old) % keep_every_steps == 0)]


def delete(checkpoints: Iterable[Path]) -> None:
    """Delete checkpoints; each is renamed first, so that a kill leaves it complete or without its name."""
    for checkpoint in checkpoints:
        discarded = checkpoint.with_name(f".{_original_path(checkpoint).name}.discarded")
        shutil.rmtree(discarded, ignore_errors=True)
        os.replace(checkpoint, discarded)
        shutil.rmtree(discarded, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the remains of killed saves and deletions. No save may be in progress."""
    leftovers = [*folder.glob(".step_*.partial"), *folder.glob(".step_*.discarded")]
    leftovers += [p for p in folder.glob(".step_*.replaced") if _original_path(p).exists()]
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)


def _list(run_dir: Path) -> tuple[Path, list[str]]:
    """Return the checkpoints folder, with links resolved, and the names in it; none if there is no such folder.

    Raises: UserError if it is a link to a folder that does not exist, or cannot be read.
    """
    folder = run_dir / FOLDER
    try:
        return folder.resolve(), os.listdir(folder)
    except FileNotFoundError:
        if not folder.is_symlink():
            return folder.resolve(), []
        problem = f"is a link to {folder.resolve()}, which does not exist: mount its disk, or correct the link"
    except NotADirectoryError:
        if not os.path.lexists(folder):
            return folder.resolve(), []
        problem = "is not a folder"
    except OSError as error:
        problem = f"cannot be read ({error.strerror}): make it readable"
    raise UserError(f"{folder} {problem}. Nothing was changed.")


def _original_path(checkpoint: Path) -> Path:
    """Return the path of a checkpoint before it was renamed to `.replaced`."""
    return checkpoint.with_name(checkpoint.name.removeprefix(".").removesuffix(".replaced"))
