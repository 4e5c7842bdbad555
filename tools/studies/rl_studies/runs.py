"""Recipes as processes of megatron_q3n.train, several at once, each within its own limit of time.

What each process took is written down beside its run (`SESSIONS`). So a study that was stopped goes on by the same
command: runs that have ended are not run again, others resume and get the rest of their time.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_q3n.config import EXIT_REQUEUE, UserError
from tools.studies.ablations.processes import Processes, last_words

SESSIONS = "sessions.json"
POLL_SECONDS = 0.2
LEAST_MINUTES = 0.2  # left of a run's time: not worth another process's start
Session = dict[str, Any]  # began, ended: Unix seconds; cpu_seconds; is_last


class Interrupted(Exception):
    """The study stops; what ran is saved."""


class Bench:
    """Where runs go, and how many of them run at once."""

    def __init__(self, output: Path, workers: int) -> None:
        self.output = output
        self._places = threading.BoundedSemaphore(workers)
        self._processes = Processes()
        self.stop = self._processes.stop

    def run(
        self,
        recipe: str,
        name: str,
        *settings: str,
        minutes: float | None = None,
        enough: Callable[[Path], bool] | None = None,
    ) -> Path:
        """Run a recipe on one core unless its run has ended, for `minutes` of wall time or until it is `enough`.

        Returns: its run directory.
        Raises: Interrupted if the study stops first; UserError if the run fails.
        """
        run_dir = self.output / name
        while not has_ended(run_dir):
            with self._places:
                self._session(recipe, run_dir, settings, minutes, enough)
        return run_dir

    def stop_in(self, minutes: float | None) -> None:
        """Stop after so long, and when this process is told to."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        if minutes is not None:
            alarm = threading.Timer(60 * minutes, self.stop)
            alarm.daemon = True
            alarm.start()

    def _session(
        self,
        recipe: str,
        run_dir: Path,
        settings: tuple[str, ...],
        minutes: float | None,
        enough: Callable[[Path], bool] | None,
    ) -> None:
        """Run one process and write down what it took."""
        known = sessions(run_dir)
        left = None if minutes is None else minutes - wall_minutes(known)
        limit = () if left is None else (f"checkpoint.time_limit_minutes={left:.3f}",)
        began = time.time()
        process = self._start(recipe, run_dir, (*settings, *limit))
        code, cpu_seconds, had_enough = _wait(process, run_dir, began, enough)
        interrupted = self._processes.forget(process) and not had_enough
        if code not in (0, EXIT_REQUEUE) and not interrupted:
            raise UserError(f"{run_dir} ended with {code}: {last_words(run_dir)}")
        session: Session = {"began": began, "ended": time.time(), "cpu_seconds": cpu_seconds}
        spent = wall_minutes([*known, session])
        is_over = minutes is not None and minutes - spent < LEAST_MINUTES
        session["is_last"] = code == 0 or had_enough or (code == EXIT_REQUEUE and is_over)
        (run_dir / SESSIONS).write_text(json.dumps([*known, session], indent=1) + "\n")
        if interrupted and not session["is_last"]:
            raise Interrupted

    def _start(self, recipe: str, run_dir: Path, settings: tuple[str, ...]) -> subprocess.Popen[bytes]:
        quiet = ("logging.progress=false", "logging.wandb.mode=disabled")
        arguments = ["--config-name", recipe, f"run_dir={run_dir}", *quiet, *settings]
        process = self._processes.start(arguments, run_dir)
        if process is None:
            raise Interrupted
        return process


def sessions(run_dir: Path) -> list[Session]:
    """Return what the processes of a run took, in their order."""
    path = run_dir / SESSIONS
    return json.loads(path.read_text()) if path.is_file() else []


def has_ended(run_dir: Path) -> bool:
    """Say whether a run is over: by itself, by its limit, or because it was enough."""
    known = sessions(run_dir)
    return bool(known) and known[-1]["is_last"]


def runs_in(output: Path) -> list[Path]:
    """Return the directories of a study's runs."""
    found = (path.parent for path in output.glob(f"*/{SESSIONS}"))
    return sorted(run_dir for run_dir in found if not run_dir.is_symlink())  # "latest" is a link


def wall_minutes(known: list[Session]) -> float:
    """Return the wall time of a run's processes, their start and end included."""
    return sum(session["ended"] - session["began"] for session in known) / 60


def minutes_at(known: list[Session], moment: float) -> float:
    """Return how long a run's processes had run at a moment (Unix seconds) in one of them."""
    return sum(max(0.0, min(moment, s["ended"]) - s["began"]) for s in known) / 60


def cost(run_dir: Path) -> dict[str, float]:
    """Return a run's wall and CPU minutes, graders included."""
    known = sessions(run_dir)
    cpu = sum(session["cpu_seconds"] for session in known) / 60
    return {"wall_minutes": wall_minutes(known), "cpu_minutes": cpu}


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's metrics; a line that is being written is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def drop_checkpoints(run_dir: Path) -> None:
    """Delete an ended run's checkpoints, gigabytes with their moments."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def _wait(
    process: subprocess.Popen[bytes], run_dir: Path, began: float, enough: Callable[[Path], bool] | None
) -> tuple[int, float, bool]:
    """Wait for a process, and stop it once it is enough: not before its first step, when it listens to signals.

    Returns: its exit code, the CPU seconds with its children's, and whether it was enough.
    """
    had_enough = False
    while True:
        pid, status, used = os.wait4(process.pid, os.WNOHANG)  # Popen.wait does not tell what was used
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, used.ru_utime + used.ru_stime, had_enough
        if enough is not None and not had_enough:
            found = records(run_dir)
            had_enough = bool(found) and found[-1]["time"] > began and enough(run_dir)
            if had_enough:
                process.terminate()
        time.sleep(POLL_SECONDS)
