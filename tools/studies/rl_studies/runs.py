"""Recipes as processes of megatron_q3n.train, several in parallel, each with its own time limit.

The time of each process is recorded in its run directory (`SESSIONS`), so the same command continues a stopped study:
runs that have ended are not repeated, others resume with the rest of their time.
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
from megatron_q3n.config.override_text import override
from tools.studies.ablations.processes import Processes, last_lines

SESSIONS = "sessions.json"
POLL_SECONDS = 0.2
# a run with less time left counts as ended, since starting a process takes as long
MIN_MINUTES_LEFT = 0.2
# began, ended: Unix seconds; cpu_seconds; is_last
Session = dict[str, Any]


class Interrupted(Exception):
    """The study was stopped; its running processes saved their state."""


class RecipeRunner:
    """Runner of recipes into folders below `output`, at most `workers` in parallel."""

    def __init__(self, output: Path, workers: int) -> None:
        self.output = output
        self._slots = threading.BoundedSemaphore(workers)
        self._processes = Processes()
        self.stop = self._processes.stop

    def run(
        self,
        recipe: str,
        name: str,
        *settings: str,
        minutes: float | None = None,
        stop_when: Callable[[Path], bool] | None = None,
    ) -> Path:
        """Run a recipe on one core unless its run has ended, for `minutes` of wall time or until `stop_when(run_dir)`.

        Returns: its run directory.
        Raises: Interrupted if the study is stopped first; UserError if the run fails.
        """
        run_dir = self.output / name
        while not has_ended(run_dir):
            with self._slots:
                self._session(recipe, run_dir, settings, minutes, stop_when)
        return run_dir

    def stop_after(self, minutes: float | None) -> None:
        """Stop after this many minutes, and at SIGTERM or SIGINT."""
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
        stop_when: Callable[[Path], bool] | None,
    ) -> None:
        """Run one process and record its time."""
        earlier = sessions(run_dir)
        minutes_left = None if minutes is None else minutes - wall_minutes(earlier)
        limit = () if minutes_left is None else (f"checkpoint.time_limit_minutes={minutes_left:.3f}",)
        began = time.time()
        process = self._start(recipe, run_dir, (*settings, *limit))
        code, cpu_seconds, is_done = _wait(process, run_dir, began, stop_when)
        interrupted = self._processes.discard(process) and not is_done
        if code not in (0, EXIT_REQUEUE) and not interrupted:
            raise UserError(f"{run_dir} ended with {code}: {last_lines(run_dir)}")
        session: Session = {"began": began, "ended": time.time(), "cpu_seconds": cpu_seconds}
        spent = wall_minutes([*earlier, session])
        is_over = minutes is not None and minutes - spent < MIN_MINUTES_LEFT
        session["is_last"] = code == 0 or is_done or (code == EXIT_REQUEUE and is_over)
        (run_dir / SESSIONS).write_text(json.dumps([*earlier, session], indent=1) + "\n")
        if interrupted and not session["is_last"]:
            raise Interrupted

    def _start(self, recipe: str, run_dir: Path, settings: tuple[str, ...]) -> subprocess.Popen[bytes]:
        logging = ("logging.progress=false", "logging.wandb.mode=disabled")
        arguments = ["--config-name", recipe, override("run_dir", run_dir), *logging, *settings]
        process = self._processes.start(arguments, run_dir)
        if process is None:
            raise Interrupted
        return process


def sessions(run_dir: Path) -> list[Session]:
    """Return the recorded sessions of a run, one for each process, in order."""
    path = run_dir / SESSIONS
    return json.loads(path.read_text()) if path.is_file() else []


def has_ended(run_dir: Path) -> bool:
    """Return whether a run has ended: normally, by its time limit, or by `stop_when`."""
    run_sessions = sessions(run_dir)
    return bool(run_sessions) and run_sessions[-1]["is_last"]


def runs_in(output: Path) -> list[Path]:
    """Return the directories of a study's runs."""
    run_dirs = (path.parent for path in output.glob(f"*/{SESSIONS}"))
    # "latest" is a link
    return sorted(run_dir for run_dir in run_dirs if not run_dir.is_symlink())


def wall_minutes(run_sessions: list[Session]) -> float:
    """Return the wall time of a run's processes, including their start and end."""
    return sum(session["ended"] - session["began"] for session in run_sessions) / 60


def minutes_at(run_sessions: list[Session], moment: float) -> float:
    """Return the minutes that a run's processes had run at a moment (Unix seconds)."""
    return sum(max(0.0, min(moment, s["ended"]) - s["began"]) for s in run_sessions) / 60


def cost(run_dir: Path) -> dict[str, float]:
    """Return a run's wall and CPU minutes, with its reward workers."""
    run_sessions = sessions(run_dir)
    cpu = sum(session["cpu_seconds"] for session in run_sessions) / 60
    return {"wall_minutes": wall_minutes(run_sessions), "cpu_minutes": cpu}


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's metrics, without an incomplete last line."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def drop_checkpoints(run_dir: Path) -> None:
    """Delete an ended run's checkpoints, which take gigabytes."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def _wait(
    process: subprocess.Popen[bytes], run_dir: Path, began: float, stop_when: Callable[[Path], bool] | None
) -> tuple[int, float, bool]:
    """Wait for a process, and stop it when `stop_when` holds after its first step, when it handles signals.

    Returns: its exit code, CPU seconds with its children's, and whether `stop_when` ended it.
    """
    is_done = False
    while True:
        # Popen.wait does not return the resource usage
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage.ru_utime + usage.ru_stime, is_done
        if stop_when is not None and not is_done:
            metrics = records(run_dir)
            is_done = bool(metrics) and metrics[-1]["time"] > began and stop_when(run_dir)
            if is_done:
                process.terminate()
        time.sleep(POLL_SECONDS)
