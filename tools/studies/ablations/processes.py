"""Running processes of megatron_q3n.train in a study: started with one thread each, and stopped together.

Selection and outcome of the runs are elsewhere (tools/studies/ablations/runs.py, tools/studies/rl_studies/runs.py).
"""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
OUTPUT = "output.txt"
LAST_LINES = 3


class Processes:
    """Set of running processes. Several threads may start them."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        # re-entrant: a signal may call stop() while its own thread starts a process
        self._lock, self._stopping = threading.RLock(), False

    def start(self, arguments: Sequence[str], run_dir: Path) -> subprocess.Popen[bytes] | None:
        """Start a process with its output appended to the run's output file; return None after stop()."""
        run_dir.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        with self._lock, (run_dir / OUTPUT).open("ab") as output:
            if self._stopping:
                return None
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_q3n.train", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            self._running.add(process)
            return process

    def discard(self, process: subprocess.Popen[bytes]) -> bool:
        """Remove a process that has ended. Returns: whether stop() was called."""
        with self._lock:
            self._running.discard(process)
            return self._stopping

    def stop(self) -> None:
        """Start no more processes, and send SIGTERM to the running ones, which save and end."""
        with self._lock:
            self._stopping = True
            for process in self._running:
                process.terminate()


def last_lines(run_dir: Path) -> str:
    """Return the last lines of a run's output."""
    lines = (run_dir / OUTPUT).read_text(errors="replace").splitlines()
    return "\n".join([line for line in lines if line.strip()][-LAST_LINES:])
