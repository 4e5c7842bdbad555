"""Status of a run or pipeline: the state of each stage, and why a stage has stopped.

python -m slurm.status runs/pipeline-tiny-…
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_q3n.config import EXIT_BAD_INPUT, UserError
from slurm import jobs, pipeline, progress

USAGE = "python -m slurm.status RUN_OR_PIPELINE_DIR"
FAILED_STATES = ("failed", "gave up", "stopped", "ended by Slurm")


def main() -> int:
    """Print the table; return 2 for a folder that is not a run or pipeline."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(f"Usage: {USAGE}", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        stages = pipeline.read_lineage(Path(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("stage", "state", "job", "step", "attempts", "last message"):
        table.add_column(column, overflow="fold")
    for row in rows(stages):
        table.add_row(*row)
    Console().print(table)
    return 0


def rows(stages: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return one row per stage: name, state, job, step, attempts, last message."""
    result: list[tuple[str, ...]] = []
    states: dict[str, str] = {}
    for stage in stages:
        run_dir = Path(stage["run_dir"])
        lines = progress.attempts(run_dir)
        ids = [str(line["job"]) for line in lines if line.get("job")]
        queued = jobs.states(ids[-1:]).get(ids[-1]) if ids else None
        state, message = _state(run_dir, lines, queued)
        before = stage["from"]
        if state == "waiting" and states.get(before) in (*FAILED_STATES, "not started"):
            state, message = "not started", f"{before} {states[before]}"
        states[stage["name"]] = state
        num_attempts = sum(line["event"] == "begin" for line in lines)
        result.append((stage["name"], state, ids[-1] if ids else "", _step(run_dir), str(num_attempts), message))
    return result


def _state(run_dir: Path, lines: list[dict[str, Any]], queued: tuple[str, str] | None) -> tuple[str, str]:
    """Return the state of a stage and the reason."""
    if progress.is_concluded(run_dir, _job(run_dir).get("steps")):
        return "done", ""
    last = next((line for line in reversed(lines) if line["event"] in ("begin", "end", "resubmitted")), None)
    if queued is not None and jobs.is_active(queued[0]):
        is_pending = queued[0] == "PENDING"
        message = last["reason"] if last and last["event"] == "end" else ""
        reason = ", ".join(filter(None, [queued[1] if queued[1] != "None" else "", message]))
        return ("waiting" if is_pending and not last else queued[0].lower(), reason)
    if last is None or last["event"] == "resubmitted":
        return "waiting", "" if queued is None else f"{queued[0].lower()}: {queued[1]}"
    if last["event"] == "begin":
        return ("running", "") if queued is None else ("failed", f"ended by Slurm: {queued[0].lower()}")
    return (last["decision"] if last["decision"] != "again" else "running", last["reason"])


def _step(run_dir: Path) -> str:
    steps, records = _job(run_dir).get("steps"), run_dir / "metrics.jsonl"
    if steps is None:
        return ""
    step = progress.newest_step(run_dir)
    if records.is_file():
        last = records.read_bytes().rsplit(b"\n", 2)[-2:]
        step = json.loads(last[0]).get("step", step) if last[0] else step
    return f"{step}/{steps}"


def _job(run_dir: Path) -> dict[str, Any]:
    path = run_dir / progress.SLURM_FOLDER / progress.JOB
    return json.loads(path.read_text()) if path.is_file() else {}


if __name__ == "__main__":
    sys.exit(main())
