"""Status of a run or pipeline: the state of each stage, and why a stage has stopped.

python -m slurm.status runs/pipeline-tiny-…
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_q3n.config import EXIT_BAD_INPUT, UserError
from slurm import jobs, pipeline, progress
from slurm.pipeline import Stage

USAGE = "python -m slurm.status RUN_OR_PIPELINE_DIR"
FAILED_STATES = ("failed", "gave up", "stopped", "ended by Slurm")


def main() -> int:
    """Print the table; return 2 for a folder that is not a run or pipeline, or whose files are damaged."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(f"Usage: {USAGE}", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("stage", "state", "job", "step", "attempts", "last message"):
            table.add_column(column, overflow="fold")
        for row in rows(pipeline.read_lineage(Path(sys.argv[1]))):
            table.add_row(*map(escape, row))
    # messages of OSError contain the file name
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    Console().print(table)
    return 0


def rows(stages: list[Stage]) -> list[tuple[str, ...]]:
    """Return one row per stage: name, state, job, step, attempts, last message.

    Raises: UserError if the job.json of a stage is damaged.
    """
    result: list[tuple[str, ...]] = []
    states: dict[str, str] = {}
    for stage in stages:
        steps = pipeline.read_job(stage).steps
        lines = progress.attempts(stage.run_dir)
        ids = [str(line["job"]) for line in lines if line.get("job")]
        queued = jobs.states(ids[-1:]).get(ids[-1]) if ids else None
        state, message = _state(stage.run_dir, steps, lines, queued)
        before = stage.begins_with
        if state == "waiting" and states.get(before or "") in (*FAILED_STATES, "not started"):
            state, message = "not started", f"{before} {states[before or '']}"
        states[stage.name] = state
        num_attempts = sum(line["event"] == "begin" for line in lines)
        step = "" if steps is None else f"{_newest_step(stage.run_dir)}/{steps}"
        result.append((stage.name, state, ids[-1] if ids else "", step, str(num_attempts), message))
    return result


def _state(
    run_dir: Path, steps: int | None, lines: list[dict[str, Any]], queued: tuple[str, str] | None
) -> tuple[str, str]:
    """Return the state of a stage and the reason."""
    if progress.is_concluded(run_dir, steps):
        return "done", ""
    last = next((line for line in reversed(lines) if line["event"] in ("begin", "end", "resubmitted")), None)
    if queued is not None and jobs.is_active(queued[0]):
        is_pending = queued[0] == "PENDING"
        message = str(last["reason"]) if last and last["event"] == "end" else ""
        reason = ", ".join(filter(None, [queued[1] if queued[1] != "None" else "", message]))
        return ("waiting" if is_pending and not last else queued[0].lower(), reason)
    if last is None or last["event"] == "resubmitted":
        return "waiting", "" if queued is None else f"{queued[0].lower()}: {queued[1]}"
    if last["event"] == "begin":
        return ("running", "") if queued is None else ("failed", f"ended by Slurm: {queued[0].lower()}")
    return (str(last["decision"]) if last["decision"] != "again" else "running", str(last["reason"]))


def _newest_step(run_dir: Path) -> int:
    """Return the newest step in metrics.jsonl, whose last line may be incomplete, or else of a checkpoint."""
    records = run_dir / "metrics.jsonl"
    for line in reversed(records.read_bytes().split(b"\n")) if records.is_file() else ():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                return record["step"]
    return progress.newest_step(run_dir)


if __name__ == "__main__":
    sys.exit(main())
