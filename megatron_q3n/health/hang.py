"""Hang detector: a thread that detects missing progress, writes the stacks of all threads, and ends the process.

A rank that hangs blocks all others in their next collective. So the detectors of all ranks fire within the time of a
step, and together they write every rank's stack: ranks inside a collective are blocked, the one elsewhere is the cause.
The launcher ends the remaining processes once the first one has exited.

There are two timers, because Python code cannot run while a C call holds the interpreter lock: this thread, which
writes files and messages, and slightly later faulthandler's timer, written in C, which can only dump to stderr and
exit.
"""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

from megatron_q3n.config.errors import EXIT_HANG
from megatron_q3n.config.health import HealthConfig

# time for the other ranks to write their stacks, before the first exit makes the launcher end them
GRACE_SECONDS = 5.0


class HangDetector:
    """Hang detection of one process between `start` and `stop`; call `heartbeat` after everything that takes long."""

    def __init__(self, settings: HealthConfig, run_dir: Path, rank: int, host: str) -> None:
        self._settings = settings
        self._run_dir, self._rank, self._host = run_dir, rank, host
        self._seconds: deque[float] = deque(maxlen=50)
        self._changed = threading.Condition()
        self._deadline = 0.0
        self._limit = settings.hang_startup_seconds
        self._is_stopped = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start; the first heartbeat may take `hang_startup_seconds`."""
        if self._settings.hang_factor == 0:
            return
        self._is_stopped = False
        self._limit = self._settings.hang_startup_seconds
        self._arm()
        self._thread = threading.Thread(target=self._run, name="hang detector", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop; safe to call twice."""
        if self._thread is None:
            return
        faulthandler.cancel_dump_traceback_later()
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        self._thread.join()
        self._thread = None

    def heartbeat(self, step_seconds: float | None = None) -> None:
        """Reset the timers; `step_seconds` is the duration of a step just done, from which the limit follows."""
        if self._thread is None:
            return
        if step_seconds is not None:
            self._seconds.append(step_seconds)
        if self._seconds:
            limit = self._settings.hang_factor * statistics.median(self._seconds)
            self._limit = max(limit, self._settings.hang_min_seconds)
        self._arm()

    def _arm(self) -> None:
        with self._changed:
            self._deadline = time.monotonic() + self._limit
            # without notify: the thread reads a later deadline when its wait for the earlier one ends
        fallback_seconds = self._limit + 2 * GRACE_SECONDS
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback_later(fallback_seconds, exit=True, file=sys.__stderr__)

    def _run(self) -> None:
        with self._changed:
            while not self._is_stopped and time.monotonic() < self._deadline:
                # at most 1 s: the first deadline is far off, and a nearer one follows it
                self._changed.wait(min(1.0, self._deadline - time.monotonic()))
            if self._is_stopped:
                return
        self._report()
        time.sleep(GRACE_SECONDS)
        # sys.exit would wait for the thread that hangs
        os._exit(EXIT_HANG)

    def _report(self) -> None:
        """Write the stacks to logs/stacks/ and stderr, and a line to logs/events.log."""
        stacks = self._run_dir / "logs" / "stacks" / f"rank_{self._rank:05d}.txt"
        message = (
            f"rank {self._rank} on {self._host}: no progress for {self._limit:.0f} s (health.hang_factor, "
            f"hang_min_seconds); stacks in {stacks}, leaving with code {EXIT_HANG}"
        )
        print(f"hang: {message}", file=sys.__stderr__, flush=True)
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            stacks.parent.mkdir(parents=True, exist_ok=True)
            with stacks.open("w", encoding="utf-8") as file:
                file.write(f"{now} {message}\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
            with (self._run_dir / "logs" / "events.log").open("a", encoding="utf-8") as events:
                events.write(f"{now} {message}\n")
        # a failing file system may be the cause of the hang
        except OSError as error:
            print(f"hang: the stacks could not be written to files and are only above: {error}", file=sys.__stderr__)
