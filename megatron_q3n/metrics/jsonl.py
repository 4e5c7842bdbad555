"""metrics.jsonl: one JSON object per optimizer step, in order, each step once. wandb and the report follow it.

A process killed between two checkpoints leaves lines of steps that will be run again, and possibly a partial line.
`open_at` removes both before the first new line is appended. This is atomic: the kept lines are written to a temporary
file, which then replaces the old one. JSON has no nan or infinity; they are written as null and read as nan.
"""

import json
import math
import os
from pathlib import Path

from megatron_q3n.config import UserError
from megatron_q3n.metrics.names import STEP

# integers beyond are damage: neither a step nor a number of tokens
MAX_COUNT = 2**63
Record = dict[str, float]


class MetricsFile:
    """metrics.jsonl open for appending; make one with `open_at`."""

    def __init__(self, path: Path, last_step: int, cut_lines: int) -> None:
        self.path = path
        # step of the last line in the file, 0 if it is empty
        self.last_step = last_step
        # number of lines removed when the file was opened
        self.cut_lines = cut_lines
        # unbuffered, so that after a failed write close() does not write the rest of a partial line
        self._file = path.open("ab", buffering=0)

    def append(self, record: Record) -> None:
        """Append one line with an unbuffered write, so that it survives a killed process.

        Raises: UserError if the file cannot be written.
        """
        assert record[STEP] > self.last_step, f"step {record[STEP]} is not after step {self.last_step}"
        plain = {name: value if math.isfinite(value) else None for name, value in record.items()}
        line = json.dumps(plain, allow_nan=False).encode() + b"\n"
        try:
            # a write may be partial on a nearly full disk
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.last_step = int(record[STEP])

    def sync(self) -> None:
        """Flush all lines to disk (fsync), so that they survive a power failure.

        Raises: UserError if the file cannot be written.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_at(path: Path, step: int) -> MetricsFile:
    """Open metrics.jsonl for appending after `step`, the step of the checkpoint that the run resumes from (0: none).

    Lines of later steps and lines that are not complete records are removed first.

    Raises: UserError if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        last_step, cut_lines = _cut_back(path, step) if path.exists() else (0, 0)
        return MetricsFile(path, last_step, cut_lines)
    except OSError as error:
        raise cannot_write(path, error) from error


def read(path: Path) -> list[Record]:
    """Return all complete records; null becomes nan. A partial last line is skipped."""
    return read_from(path, 0)[0] if path.exists() else []


def read_from(path: Path, offset: int) -> tuple[list[Record], int]:
    """Return the complete records after byte `offset`, and the offset after the last of them."""
    records = []
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            record = _parse(line)
            if record is not None:
                records.append(record)
    return records, offset


def _parse(line: bytes) -> Record | None:
    """Return the record of a line, or None if the line is not a record (partial, zero-filled, or foreign)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    step = record.get(STEP)
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= MAX_COUNT:
        return None
    return {name: _number(value) for name, value in record.items()}


def _number(value: object) -> float:
    """Return the value of a metric; nan for null, and for what is damaged (a text, a list, a number beyond floats)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return value if isinstance(value, float) or abs(value) <= MAX_COUNT else math.nan


def _cut_back(path: Path, step: int) -> tuple[int, int]:
    """Keep the complete records up to `step`; return the last kept step and the number of lines removed."""
    last_step, kept_lines, num_lines = 0, 0, 0
    temporary = path.with_name(path.name + ".cut")
    with path.open("rb") as old, temporary.open("wb") as new:
        for line in old:
            num_lines += 1
            record = _parse(line) if line.endswith(b"\n") else None
            if record is not None and last_step < record[STEP] <= step:
                new.write(line)
                kept_lines += 1
                last_step = int(record[STEP])
        new.flush()
        os.fsync(new.fileno())
    if kept_lines == num_lines:
        temporary.unlink()
    else:
        os.replace(temporary, path)
    return last_step, num_lines - kept_lines


def cannot_write(path: Path, error: OSError) -> UserError:
    """Return the error for a file that cannot be written."""
    return UserError(
        f"{path}: cannot be written ({error.strerror}). The checkpoints are not affected; free disk space or fix the "
        "permissions, then start again with run_dir set to this run's directory."
    )
