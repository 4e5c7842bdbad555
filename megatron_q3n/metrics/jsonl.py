"""metrics.jsonl: one JSON object per optimizer step, in order, each step once. wandb and the report follow it.

A process killed between two checkpoints leaves lines of steps that will be run again, and perhaps half a line.
`open_at` cuts both before the first new line is appended, in a way that a second kill cannot spoil: the kept
lines go to a temporary file which then replaces the old one. JSON has no word for nan or infinity, so they are
written as null and read as nan.
"""

import json
import math
import os
from pathlib import Path

from megatron_q3n.config import UserError
from megatron_q3n.metrics.names import STEP

Record = dict[str, float]


class MetricsFile:
    """metrics.jsonl open for appending; make one with `open_at`."""

    def __init__(self, path: Path, last_step: int, cut_lines: int) -> None:
        self.path = path
        self.last_step = last_step  # of the last line in the file, 0 if it holds none
        self.cut_lines = cut_lines  # removed when the file was opened
        # Unbuffered: after a refused write no half line waits in memory to be written by close().
        self._file = path.open("ab", buffering=0)

    def append(self, record: Record) -> None:
        """Write one line and hand it to the operating system: it survives a killed process.

        Raises: UserError when the disk refuses.
        """
        assert record[STEP] > self.last_step, f"step {record[STEP]} is not after step {self.last_step}"
        plain = {name: value if math.isfinite(value) else None for name, value in record.items()}
        line = json.dumps(plain, allow_nan=False).encode() + b"\n"
        try:
            while line:  # a nearly full disk takes a part and refuses the rest
                line = line[self._file.write(line) :]
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.last_step = int(record[STEP])

    def sync(self) -> None:
        """Force all lines onto the disk: they survive a power failure."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing can be appended after."""
        self._file.close()


def open_at(path: Path, step: int) -> MetricsFile:
    """Open metrics.jsonl for appending after `step`, the step of the checkpoint that the run goes on from (0: none).

    Lines of later steps and lines that are no whole record are removed first.
    Raises: UserError when the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        last_step, cut_lines = _cut_back(path, step) if path.exists() else (0, 0)
        return MetricsFile(path, last_step, cut_lines)
    except OSError as error:
        raise cannot_write(path, error) from error


def read(path: Path) -> list[Record]:
    """Return all whole records; null becomes nan. A torn last line is left out."""
    return read_from(path, 0)[0] if path.exists() else []


def read_from(path: Path, offset: int) -> tuple[list[Record], int]:
    """Return the whole records after byte `offset`, and the byte after the last of them."""
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
    """Return the record of a line, or None if it is not one: torn, overwritten with zeros, or foreign."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get(STEP), int):
        return None
    return {name: math.nan if value is None else value for name, value in record.items()}


def _cut_back(path: Path, step: int) -> tuple[int, int]:
    """Keep the whole records up to `step`; return the last kept step and the number of lines removed."""
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
    """Return what to tell the user when the disk refuses."""
    return UserError(
        f"{path}: cannot be written ({error.strerror}). The checkpoints are untouched; make room or permit writing, "
        "then start again with run_dir set to this run's directory."
    )
