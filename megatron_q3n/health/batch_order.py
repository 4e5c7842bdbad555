"""Which batches a run leaves out, and so which batch each step trains on.

A step's batch is a function of the step: nothing but the step needs saving. Going back and leaving a batch out
keeps that true with one short list, `skipped_batches.json` in the run directory: step s trains on the s-th batch
that is not on the list. The list is outside the checkpoints, since going back to one must not forget it. Batches that
are missing at the end because some were left out are taken from the beginning.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILE = "skipped_batches.json"


class BatchOrder:
    """The order of batches, counted from 0, without those left out."""

    def __init__(self, skipped: list[int], num_steps: int) -> None:
        assert num_steps > 0, num_steps
        self.skipped = frozenset(skipped)
        self._num_steps = num_steps

    def batch_of(self, step: int) -> int:
        """Return the number of the batch that the step after `step` steps trains on."""
        number = step
        again = [skipped + self._num_steps for skipped in self.skipped]
        for skipped in sorted([*self.skipped, *again]):
            number += skipped <= number
        return number

    def batches[Batch](self, source: Callable[[int], Iterator[Batch]], first_step: int) -> Iterator[Batch]:
        """Yield the batches of the steps from `first_step` on; `source(n)` yields batch n and those behind it.

        `source` ends with batch `num_steps - 1`; the numbers behind it mean the first batches again.
        """
        number = self.batch_of(first_step)
        while True:
            for batch in source(number % self._num_steps):
                if number % self._num_steps not in self.skipped:
                    yield batch
                number += 1


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Return the roll-backs of a run: {step, kind, what, back_to, batches}."""
    path = run_dir / FILE
    return json.loads(path.read_text()) if path.is_file() else []


def write(run_dir: Path, roll_backs: list[dict[str, Any]]) -> None:
    """Replace the list in one step, and force it to disk: going back without it would meet the same batch again."""
    partial = run_dir / f".{FILE}.{os.getpid()}"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(roll_backs, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, run_dir / FILE)


def left_out(roll_backs: list[dict[str, Any]]) -> list[int]:
    """Return the numbers of all batches left out."""
    return sorted({number for entry in roll_backs for number in entry["batches"]})
