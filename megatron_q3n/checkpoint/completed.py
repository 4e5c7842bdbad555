"""Record of a run's newest complete checkpoint, `logs/last_checkpoint.json`, outside of its checkpoints folder.

The folder `checkpoints` is often a link to another disk. Without that disk, a run that has checkpoints looks like one
that has none yet, and would train from the first step into the directory of a trained model. The record tells the two
apart. Runs of earlier versions have no record: their summary, or a metrics.jsonl that is beyond their second save
(which begins once the first is complete), shows that there were checkpoints.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import yaml

from megatron_q3n.checkpoint import folders
from megatron_q3n.config import UserError

RECORD = "logs/last_checkpoint.json"


def record(run_dir: Path, checkpoint: Path) -> None:
    """Write the record, atomically. Called by the leader once a checkpoint has its final name.

    Raises: OSError if it cannot be written.
    """
    path = run_dir / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"step": folders.step_of(checkpoint), "path": str(checkpoint)}), encoding="utf-8")
    os.replace(partial, path)


def check_not_lost(run_dir: Path) -> None:
    """Check that a run which completed a checkpoint still has one, damaged or not.

    Raises: UserError if all of its checkpoints are gone, or if their folder cannot be read.
    """
    if folders.candidates(run_dir) or folders.list_damaged(run_dir):
        return
    evidence = _evidence(run_dir)
    if evidence is None:
        return
    folder = run_dir / folders.FOLDER
    place = f"{folder}, a link to {folder.resolve()}," if folder.is_symlink() else str(folder)
    raise UserError(
        f"{run_dir}: {evidence}, but {place} has no checkpoint. Nothing was changed. Mount or restore the checkpoints "
        "and resume again, or start a new run in another run_dir."
    )


def missing_newer(run_dir: Path, checkpoint: Path) -> str | None:
    """Return a message if the recorded checkpoint is newer than the newest one found and is not there; else None."""
    recorded = _recorded_step(run_dir)
    if recorded is None or recorded <= folders.step_of(checkpoint):
        return None
    if any(path.name.startswith(folders.step_name(recorded)) for path in folders.list_damaged(run_dir)):
        return None
    return (
        f"the checkpoint of step {recorded} is recorded in {RECORD} but is not there; going back to {checkpoint.name}"
    )


def _evidence(run_dir: Path) -> str | None:
    """Return what shows that the run has completed a checkpoint, or None."""
    if (step := _recorded_step(run_dir)) is not None:
        return f"the checkpoint of step {step} was complete ({RECORD})"
    if (run_dir / "summary.json").is_file():
        return "the run has a summary, which is written after its last checkpoint"
    interval, last = _interval_steps(run_dir), _last_recorded_step(run_dir)
    if interval and last > 2 * interval:
        return f"metrics.jsonl has {last} steps and a checkpoint was saved every {interval}"
    return None


def _recorded_step(run_dir: Path) -> int | None:
    content = _read(run_dir / RECORD, json.loads)
    step = content.get("step") if isinstance(content, dict) else None
    return step if isinstance(step, int) else None


def _interval_steps(run_dir: Path) -> int:
    tree = _read(run_dir / "config.yaml", yaml.safe_load)
    section = tree.get("checkpoint") if isinstance(tree, dict) else None
    interval = section.get("interval_steps") if isinstance(section, dict) else None
    return interval if isinstance(interval, int) else 0


def _last_recorded_step(run_dir: Path) -> int:
    """Return the step of the last complete line of metrics.jsonl, 0 without one."""
    lines = _read(run_dir / "metrics.jsonl", str.splitlines) or []
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            content = json.loads(line)
            if isinstance(content, dict) and isinstance(content.get("step"), int):
                return content["step"]
    return 0


def _read(path: Path, parse: Any) -> Any:
    """Return a parsed file, or None if there is none or its content is not of that kind.

    Raises: UserError if it cannot be read.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    # a file that a kill or a full disk left incomplete
    except (ValueError, yaml.YAMLError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable, then resume again.") from None
