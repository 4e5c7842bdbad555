"""The `checkpoints` folder of a run: names, which checkpoint is newest, and every step that replaces or deletes one.

Each change is one rename, so a kill at any moment leaves either the state before or the state after:

| name | what it is |
|---|---|
| `step_0000200` | a checkpoint |
| `step_0000200.damaged` | one that failed verification, kept for its owner to look at or delete |
| `.step_0000200.<token>.partial` | a save in progress, or what a kill left of one |
| `.step_0000200.replaced` | the same step saved before, until the new one has its name |
| `.step_0000200.discarded` | being deleted |
| `latest` | a link to the newest |
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_q3n.checkpoint.integrity import DESCRIPTION, sync_folder
from megatron_q3n.config import UserError

FOLDER, LATEST = "checkpoints", "latest"
_STEP = re.compile(r"\.?step_(\d+)(\.replaced)?")


def step_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's folder name."""
    match = _STEP.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def candidates(run_dir: Path) -> list[Path]:
    """Return every checkpoint of a run, newest first, whole or not.

    One whose replacement was interrupted between two renames is still there under its other name.
    """
    folder = (run_dir / FOLDER).resolve()
    steps = [path for path in folder.glob("step_*") if _STEP.fullmatch(path.name)]
    replaced = [path for path in folder.glob(".step_*.replaced") if not _place_of(path).exists()]
    return sorted(steps + replaced, key=step_of, reverse=True)


def complete(run_dir: Path) -> list[Path]:
    """Return the checkpoints that have a description, newest first; their files are not verified here."""
    return [path for path in candidates(run_dir) if (path / DESCRIPTION).is_file()]


def newest_in(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run directory, if any; its files are not verified here."""
    return next(iter(complete(run_dir)), None)


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


def damaged_in(run_dir: Path) -> list[Path]:
    """Return the checkpoints that were set aside as damaged."""
    return sorted((run_dir / FOLDER).glob("step_*.damaged*"))


def publish(partial: Path, final: Path) -> None:
    """Give a complete folder its name; one that had it gives way only then. Then point `latest` at it."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(partial, final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    point_latest(final)


def point_latest(final: Path) -> None:
    """Let the link `latest` name this checkpoint."""
    fresh = final.with_name(f".{LATEST}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    fresh.symlink_to(final.name)
    os.replace(fresh, final.with_name(LATEST))


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it neither counts nor is deleted, and return its new place."""
    place = _place_of(checkpoint)
    aside, number = place.with_name(f"{place.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = place.with_name(f"{place.name}.damaged-{number}")
    os.replace(checkpoint, aside)
    return aside


def superfluous(newest_first: list[Path], keep: int, keep_every_steps: int) -> list[Path]:
    """Return the checkpoints beyond the first `keep` that are no milestones."""
    return [old for old in newest_first[keep:] if not (keep_every_steps and step_of(old) % keep_every_steps == 0)]


def discard(checkpoints: Iterable[Path]) -> None:
    """Delete checkpoints; a kill leaves each one whole or without its name."""
    for old in checkpoints:
        gone = old.with_name(f".{_place_of(old).name}.discarded")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(old, gone)
        shutil.rmtree(gone, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what killed saves and deletions left behind. No save may be in progress."""
    done_with = [*folder.glob(".step_*.partial"), *folder.glob(".step_*.discarded")]
    done_with += [p for p in folder.glob(".step_*.replaced") if _place_of(p).exists()]
    for leftover in done_with:
        shutil.rmtree(leftover, ignore_errors=True)


def _place_of(checkpoint: Path) -> Path:
    """Return the name under which a checkpoint stands or stood."""
    return checkpoint.with_name(checkpoint.name.removeprefix(".").removesuffix(".replaced"))
