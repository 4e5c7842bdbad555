"""A variant and a seed as processes of megatron_q3n.train, several at once.

How a run ended is a result and written down beside it (`OUTCOME`), also when it failed: a study does not end because a
learning rate was too large. A run that was interrupted has no such file, and goes on from its checkpoint next time.
Once a run is written down its checkpoints are deleted: with optimizer states they are gigabytes each, and what a study
is about is recorded by then. Only a model whose evaluation failed is kept, and evaluated again next time; if it is not
there any more (records that came from another machine), the run is made anew.

Where studies run together, a run that several of them want is made once, and the others get copies (schedule.py).
"""

import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_q3n.config import EXIT_REQUEUE, UserError
from megatron_q3n.metrics.report.run_files import load
from slurm.progress import is_concluded
from tools.studies.ablations.measures import has_diverged
from tools.studies.ablations.outcomes import DIVERGED, DONE, FAILED, NOT_EVALUATED, OUTCOME, outcome_of
from tools.studies.ablations.processes import Processes, last_words
from tools.studies.ablations.recipe import Trial
from tools.studies.ablations.schedule import Shared, hand_on

STOPPED = 1000  # no process's exit code


class Bench:
    """How many runs go at once, and which are made again."""

    def __init__(self, workers: int, keep_checkpoints: bool, retry: bool) -> None:
        """`retry`: begin runs that failed anew."""
        self._workers, self._keep = workers, keep_checkpoints
        self._again = {NOT_EVALUATED, FAILED} if retry else {NOT_EVALUATED}
        self._processes = Processes()
        self.stop = self._processes.stop

    def run(self, queue: Sequence[Shared]) -> None:
        """Run what has not been run, in this order; how each ended lies beside it."""
        with ThreadPoolExecutor(self._workers) as threads:
            list(threads.map(self._shared, queue))

    def _shared(self, shared: Shared) -> None:
        if self._trial(shared.trial) is not None:
            for twin in shared.twins:
                if self._settled(twin) is None:
                    hand_on(shared.trial, twin)

    def _settled(self, trial: Trial) -> dict[str, Any] | None:
        """Return how a run ended that is not to be made again."""
        known = outcome_of(trial)
        return None if known is None or known["ended"] in self._again else known

    def _trial(self, trial: Trial) -> dict[str, Any] | None:
        if (known := self._settled(trial)) is not None:
            return known
        began = time.monotonic()
        code = 0
        is_trained = is_concluded(trial.run_dir, trial.config.training.steps)
        if is_trained and trial.is_evaluated and not (trial.run_dir / "checkpoints").is_dir():
            shutil.rmtree(trial.run_dir)
            is_trained = False
        if not is_trained:
            code = self._process(trial.training, trial.run_dir)
            if code in (STOPPED, EXIT_REQUEUE):
                return None
        ended = _ended(code, trial.run_dir)
        if ended == DONE and trial.is_evaluated:
            code = self._process(trial.evaluation, trial.run_dir)
            if code == STOPPED:
                return None
            ended = NOT_EVALUATED if code else DONE
        outcome = {
            "ended": ended,
            "exit_code": code,
            "message": last_words(trial.run_dir) if code else "",
            "seconds": round(time.monotonic() - began, 1),
        }
        (trial.run_dir / OUTCOME).write_text(json.dumps(outcome, indent=1) + "\n")
        if not self._keep and ended != NOT_EVALUATED:
            shutil.rmtree(trial.run_dir / "checkpoints", ignore_errors=True)
        where = f"{trial.run_dir.parent.name}/{trial.name}"
        print(f"{where:<48} {ended:<13} {outcome['seconds']:7.0f} s", flush=True)
        return outcome

    def _process(self, arguments: list[str], run_dir: Path) -> int:
        """Run one process to its end. Returns: its exit code, or STOPPED where the study stops."""
        process = self._processes.start(arguments, run_dir)
        if process is None:
            return STOPPED
        code = process.wait()
        return STOPPED if self._processes.forget(process) and code else code


def _ended(code: int, run_dir: Path) -> str:
    """Say how a run ended: done, diverged (whatever its exit code) or failed."""
    try:
        diverged = has_diverged(load(run_dir))
    except UserError:  # it failed before it had a configuration
        return FAILED
    if diverged:
        return DIVERGED
    return FAILED if code else DONE
