"""Sample tables of reinforcement learning, read from the JSON lines in `samples/` for wandb and the report.

    held_out_S.jsonl      completions of the held-out prompts, generated with the weights after step S
    after_step_S.jsonl    the rollout generated with the weights after step S and used by the update of step S + 1

A file is a function of its step, so a resumed run shows the same tables.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = "samples"
HELD_OUT, ROLLOUT = "held_out", "after_step"
COLUMNS = (
    "prompt",
    "member",
    "question",
    "answer",
    "text",
    "score",
    "reward",
    "advantage",
    "tokens",
    "finish_reason",
    "failure",
    "policy_version",
)
MAX_ROWS = 64
# steps between the rollouts that are shown; the files of all are kept
ROLLOUT_INTERVAL_STEPS = 20
Rows = list[list[Any]]


def file_of(run_dir: Path, kind: str, step: int) -> Path:
    """Return the path of the samples of a step."""
    return run_dir / FOLDER / f"{kind}_{step:07d}.jsonl"


def tables_at(run_dir: Path, step: int) -> Iterator[tuple[str, Rows]]:
    """Yield the name and rows of each table that belongs to a step's record."""
    held_out = file_of(run_dir, HELD_OUT, step)
    # the evaluation before the first step belongs to no record
    if step == 1 and not held_out.is_file():
        held_out = file_of(run_dir, HELD_OUT, 0)
    if held_out.is_file():
        yield "samples/held_out", rows(held_out)
    rollout = file_of(run_dir, ROLLOUT, step - 1)
    if (step - 1) % ROLLOUT_INTERVAL_STEPS == 0 and rollout.is_file():
        yield "samples/rollout", rows(rollout)


def newest(run_dir: Path, kind: str) -> Path | None:
    """Return the newest samples file of a kind, or None."""
    return max((run_dir / FOLDER).glob(f"{kind}_*.jsonl"), default=None)


def rows(file: Path) -> Rows:
    """Return the first MAX_ROWS rows of a table, in the order of COLUMNS."""
    with file.open(encoding="utf-8") as lines:
        samples = [json.loads(line) for line, _ in zip(lines, range(MAX_ROWS))]
    return [[sample.get(column) for column in COLUMNS] for sample in samples]
