"""A thread that finds a rank without progress, writes the stack of every thread, and ends the process.

One rank that hangs holds up all others in their next collective, so every rank's own watch finds it within the
time of a step, and together they leave every rank's stack: those in a collective are victims, the one
elsewhere is the cause. The launcher ends what is left once the first process has gone.

Two clocks, since Python code does not run while a C call holds the interpreter lock: this thread, which
writes files and speaks; and faulthandler's own, written in C, a little later, which can only dump to stderr and exit.
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

GRACE_SECONDS = 5.0  # for the other ranks to write their stacks, before the first exit ends them


class HangWatch:
    """Watches one process between `start` and `stop`; call `beat` after everything that takes long."""

    def __init__(self, settings: HealthConfig, run_dir: Path, rank: int, host: str) -> None:
        self._settings = settings
        self._run_dir, self._rank, self._host = run_dir, rank, host
        self._seconds: deque[float] = deque(maxlen=50)
        self._changed = threading.Condition()
        self._deadline = 0.0
        self._limit = settings.hang_start_seconds
        self._over = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch; the first sign of life may take `hang_start_seconds`."""
        if self._settings.hang_factor == 0:
            return
        self._over = False
        self._limit = self._settings.hang_start_seconds
        self._arm()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer; safe to call twice."""
        if self._thread is None:
            return
        faulthandler.cancel_dump_traceback_later()
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join()
        self._thread = None

    def beat(self, step_seconds: float | None = None) -> None:
        """Say that this process is alive; after a step, how long it took."""
        if self._thread is None:
            return
        if step_seconds is not None:
            self._seconds.append(step_seconds)
        if self._seconds:
            often = self._settings.hang_factor * statistics.median(self._seconds)
            self._limit = max(often, self._settings.hang_floor_seconds)
        self._arm()

    def _arm(self) -> None:
        with self._changed:
            self._deadline = time.monotonic() + self._limit
            # no notify: a later deadline is met when the thread wakes for the earlier one
        later = self._limit + 2 * GRACE_SECONDS
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback_later(later, exit=True, file=sys.__stderr__)

    def _watch(self) -> None:
        with self._changed:
            while not self._over and time.monotonic() < self._deadline:
                # short waits too: the first deadline, of the start, is far off and a nearer one follows it
                self._changed.wait(min(1.0, self._deadline - time.monotonic()))
            if self._over:
                return
        self._report()
        time.sleep(GRACE_SECONDS)
        os._exit(EXIT_HANG)  # sys.exit would wait for the thread that hangs

    def _report(self) -> None:
        """Write the stacks to logs/stacks/ and stderr, and tell the run's log."""
        stacks = self._run_dir / "logs" / "stacks" / f"rank_{self._rank:05d}.txt"
        message = (
            f"rank {self._rank} on {self._host}: no progress for {self._limit:.0f} s (health.hang_factor, "
            f"hang_floor_seconds); stacks in {stacks}, leaving with code {EXIT_HANG}"
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
        except OSError as error:  # a file system that hangs or fails may be the very cause
            print(f"hang: the stacks are only here, above: {error}", file=sys.__stderr__)
