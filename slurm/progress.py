"""Progress and attempts of a run: files in the run directory, accessed with the standard library only.

    logs/outcome.json      exit code and message of the last training process (written by megatron_q3n/train.py)
    slurm/attempts.jsonl   one line when an attempt begins, one when it ends, one per submission
    logs/events.log        log of events for users

Attempts never overlap: Slurm starts a requeued job only after the last process of the previous attempt has exited.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

SLURM_FOLDER = "slurm"
ATTEMPTS = "attempts.jsonl"
JOB = "job.json"
EXCLUDED = "excluded_nodes.txt"
# event of a line in attempts.jsonl -> the values that it has
_FIELDS = {
    "submitted": {"job"},
    "resubmitted": set(),
    "begin": {"step", "nodes"},
    "end": {"decision", "code", "reason", "step"},
}


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest complete checkpoint, 0 if there is none."""
    steps = [0]
    for description in (run_dir / "checkpoints").glob("step_*/checkpoint.json"):
        match = re.fullmatch(r"step_(\d+)", description.parent.name)
        if match:
            steps.append(int(match[1]))
    return max(steps)


def is_concluded(run_dir: Path, steps: int | None) -> bool:
    """Return whether the run is complete: all steps in its summary, or without training (no steps) exit code 0."""
    summary = _read(run_dir / "summary.json")
    if steps is None or not summary:
        return read_outcome(run_dir).get("code") == 0
    done = summary.get("steps")
    return isinstance(done, int) and done >= steps


def read_outcome(run_dir: Path) -> dict[str, Any]:
    """Return {code, message, time} of the last process that wrote its outcome, or an empty dict."""
    return _read(run_dir / "logs" / "outcome.json")


def write_outcome(run_dir: Path, code: int, message: str = "") -> None:
    """Write the outcome of a stage without a training process."""
    path = run_dir / "logs" / "outcome.json"
    path.write_text(json.dumps({"code": code, "message": message, "time": time.time()}))


def delete_outcome(run_dir: Path) -> None:
    """Delete the outcome of the previous attempt."""
    path = run_dir / "logs" / "outcome.json"
    if path.exists():
        path.unlink()


def attempts(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of attempts.jsonl, oldest first; a partial line, which a kill may leave, is skipped."""
    path = run_dir / SLURM_FOLDER / ATTEMPTS
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        event = record.get("event") if isinstance(record, dict) else None
        if isinstance(event, str) and _FIELDS.get(event, {"?"}) <= set(record):
            lines.append(record)
    return lines


def add_attempt_line(run_dir: Path, **values: Any) -> None:
    """Append one line to attempts.jsonl."""
    with (run_dir / SLURM_FOLDER / ATTEMPTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.time(), **values}) + "\n")


def reset_attempts(run_dir: Path) -> None:
    """Reset the attempt count and the excluded nodes when a user resubmits the run."""
    add_attempt_line(run_dir, event="resubmitted")
    excluded = run_dir / SLURM_FOLDER / EXCLUDED
    if excluded.exists():
        excluded.unlink()


def count_attempts_without_progress(run_dir: Path) -> int:
    """Return the number of latest attempts that began at the current step, counted since the last resubmission."""
    count, step = 0, newest_step(run_dir)
    for line in reversed(attempts(run_dir)):
        if line["event"] == "resubmitted":
            break
        if line["event"] == "begin":
            if line["step"] != step:
                break
            count += 1
    return count


def log_event(run_dir: Path, message: str) -> None:
    """Append a message to logs/events.log and print it to the job's output."""
    print(f"supervise: {message}", flush=True)
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    with (run_dir / "logs" / "events.log").open("a", encoding="utf-8") as file:
        file.write(f"{now} {message}\n")


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty if it is absent or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
