"""Processes of megatron_q3n.train that a study has running: started on one core each, and told to end together.

Which runs there are, when they are over and what came of them is the benches' business (runs.py, rl_studies/runs.py).
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
    """The processes that run now. Several threads may start them."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        # re-entrant: a signal may ask to stop while its own thread is starting a process
        self._lock, self._stopping = threading.RLock(), False

    def start(self, arguments: Sequence[str], run_dir: Path) -> subprocess.Popen[bytes] | None:
        """Start one, whose output is added to the run's; None once all have been told to end."""
        run_dir.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
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

    def forget(self, process: subprocess.Popen[bytes]) -> bool:
        """Forget a process that has ended. Returns: whether all had been told to."""
        with self._lock:
            self._running.discard(process)
            return self._stopping

    def stop(self) -> None:
        """Start nothing more, and ask what runs to save and end."""
        with self._lock:
            self._stopping = True
            for process in self._running:
                process.terminate()


def last_words(run_dir: Path) -> str:
    """Return the last lines that a run's processes have written."""
    lines = (run_dir / OUTPUT).read_text(errors="replace").splitlines()
    return "\n".join([line for line in lines if line.strip()][-LAST_LINES:])
