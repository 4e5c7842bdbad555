"""Batch order of a run: the batch of each step, without the batches that roll-backs skip.

The batch is a function of the step, so the step is all that a checkpoint must hold. With skipped batches it stays one:
step s trains on the s-th batch that is not listed in `skipped_batches.json` in the run directory. The list is outside
of the checkpoints, because returning to a checkpoint must not undo it. Batches missing at the end are taken from the
beginning.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILE = "skipped_batches.json"


class BatchOrder:
    """Order of the batches, counted from 0, without the skipped ones."""

    def __init__(self, skipped: list[int], num_steps: int) -> None:
        assert num_steps > 0, num_steps
        self.skipped = frozenset(skipped)
        self._num_steps = num_steps

    def batch_of(self, step: int) -> int:
        """Return the number of the batch on which the run trains after `step` finished steps."""
        number = step
        # in the second pass over the batches they are skipped again
        second_pass = [skipped + self._num_steps for skipped in self.skipped]
        for skipped in sorted([*self.skipped, *second_pass]):
            number += skipped <= number
        return number

    def batches[Batch](self, source: Callable[[int], Iterator[Batch]], first_step: int) -> Iterator[Batch]:
        """Yield the batches of the steps from `first_step` on; `source(n)` yields batch n and the following ones.

        `source` ends with batch `num_steps - 1`; higher numbers wrap around to the first batches.
        """
        number = self.batch_of(first_step)
        while True:
            for batch in source(number % self._num_steps):
                if number % self._num_steps not in self.skipped:
                    yield batch
                number += 1


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Return the recorded roll-backs of a run: {step, kind, what, back_to, batches}."""
    path = run_dir / FILE
    return json.loads(path.read_text()) if path.is_file() else []


def write(run_dir: Path, roll_backs: list[dict[str, Any]]) -> None:
    """Replace the file atomically and flush it to disk: without it, the run would train on the same batch again."""
    partial = run_dir / f".{FILE}.{os.getpid()}"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(roll_backs, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, run_dir / FILE)


def skipped_batches(roll_backs: list[dict[str, Any]]) -> list[int]:
    """Return the numbers of all skipped batches."""
    return sorted({number for entry in roll_backs for number in entry["batches"]})
