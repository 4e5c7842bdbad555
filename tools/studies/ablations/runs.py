"""Execution of a study's runs as processes of megatron_q3n.train, several at once.

The outcome of a run is a result and is written to its directory (`OUTCOME`), also when the run failed: a study does not
end because a learning rate was too large. An interrupted run has no such file, and resumes from its checkpoint at the
next call. Checkpoints are deleted after the outcome is written: with optimizer states they have gigabytes each, and all
numbers of the study are recorded by then. Only a model whose evaluation failed is kept, and evaluated again at the next
call; without its checkpoint (records copied from another machine) it is trained again.

A run that several studies share is executed once, and copied to the others (schedule.py).
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
from tools.studies.ablations.processes import Processes, last_lines
from tools.studies.ablations.recipe import Trial
from tools.studies.ablations.schedule import SharedTrial, copy_run

# not an exit code of any process
STOPPED = 1000


class TrialRunner:
    """Executes runs, a number of them at once."""

    def __init__(self, workers: int, keep_checkpoints: bool, retry: bool) -> None:
        """Create the runner. `retry`: repeat failed runs."""
        self._workers, self._keep = workers, keep_checkpoints
        self._repeated = {NOT_EVALUATED, FAILED} if retry else {NOT_EVALUATED}
        self._processes = Processes()
        self.stop = self._processes.stop

    def run(self, queue: Sequence[SharedTrial]) -> None:
        """Execute the runs that have no outcome, in this order, and write the outcome of each to its directory."""
        with ThreadPoolExecutor(self._workers) as threads:
            list(threads.map(self._run_shared, queue))

    def _run_shared(self, shared: SharedTrial) -> None:
        if self._run_trial(shared.trial) is not None:
            for copy in shared.copies:
                if self._final_outcome(copy) is None:
                    copy_run(shared.trial, copy)

    def _final_outcome(self, trial: Trial) -> dict[str, Any] | None:
        """Return the outcome of a run, or None if it must be executed."""
        outcome = outcome_of(trial)
        return None if outcome is None or outcome["ended"] in self._repeated else outcome

    def _run_trial(self, trial: Trial) -> dict[str, Any] | None:
        if (outcome := self._final_outcome(trial)) is not None:
            return outcome
        began = time.monotonic()
        code = 0
        is_trained = is_concluded(trial.run_dir, trial.config.training.steps)
        if is_trained and trial.is_evaluated and not (trial.run_dir / "checkpoints").is_dir():
            shutil.rmtree(trial.run_dir)
            is_trained = False
        if not is_trained:
            code = self._run_process(trial.training, trial.run_dir)
            if code in (STOPPED, EXIT_REQUEUE):
                return None
        ended = _ended(code, trial.run_dir)
        if ended == DONE and trial.is_evaluated:
            code = self._run_process(trial.evaluation, trial.run_dir)
            if code == STOPPED:
                return None
            ended = NOT_EVALUATED if code else DONE
        outcome = {
            "ended": ended,
            "exit_code": code,
            "message": last_lines(trial.run_dir) if code else "",
            "seconds": round(time.monotonic() - began, 1),
        }
        (trial.run_dir / OUTCOME).write_text(json.dumps(outcome, indent=1) + "\n")
        if not self._keep and ended != NOT_EVALUATED:
            shutil.rmtree(trial.run_dir / "checkpoints", ignore_errors=True)
        label = f"{trial.run_dir.parent.name}/{trial.name}"
        print(f"{label:<48} {ended:<13} {outcome['seconds']:7.0f} s", flush=True)
        return outcome

    def _run_process(self, arguments: list[str], run_dir: Path) -> int:
        """Run one process to its end. Returns: its exit code, or STOPPED if the study stops."""
        process = self._processes.start(arguments, run_dir)
        if process is None:
            return STOPPED
        code = process.wait()
        return STOPPED if self._processes.discard(process) and code else code


def _ended(code: int, run_dir: Path) -> str:
    """Return how a run ended: done, diverged (with any exit code) or failed."""
    try:
        diverged = has_diverged(load(run_dir))
    # it failed before it wrote its configuration
    except UserError:
        return FAILED
    if diverged:
        return DIVERGED
    return FAILED if code else DONE
