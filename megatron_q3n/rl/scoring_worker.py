"""Scoring worker process: confines itself, then reads one JSON object per line and writes one per line.

    python -m megatron_q3n.rl.scoring_worker SETTINGS      (SETTINGS: WorkerSettings as JSON)

It writes {"ready", "isolation"} first; then each {"id", "text", "arguments"} gets {"id", and "score", "no_answer" or
"error"}. Each response is scored in a forked process (scoring_process.py), which has neither of the two pipes. The end
of the requests ends the process and all below it. The parent is `reward_workers.py`.
"""

import contextlib
import json
import os
import select
import signal
import sys
from dataclasses import asdict, dataclass
from typing import Any

from megatron_q3n.rl.sandbox.confinement import Confinement, Isolation, confine

_CHUNK_BYTES = 1 << 16
# requests to the trainer to stop, which Slurm sends to every process of a job step
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker process needs to know, passed as JSON."""

    kind: str
    function: str | None
    answer_pattern: str | None
    time_limit_seconds: float
    memory_bytes: int
    network: bool
    readable_paths: tuple[str, ...]
    scratch: str
    is_bubblewrapped: bool

    def as_json(self) -> str:
        """Return the settings as the command's argument."""
        return json.dumps(asdict(self))


class _Pipes:
    """Requests and replies, moved away from standard input and output, which scoring functions may use."""

    def __init__(self) -> None:
        self.requests, self.replies = os.dup(sys.stdin.fileno()), os.dup(sys.stdout.fileno())
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, sys.stdin.fileno())
        os.close(nothing)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._received = b""

    def read(self) -> dict[str, Any] | None:
        """Return the next request; None at the end."""
        while b"\n" not in self._received:
            chunk = os.read(self.requests, _CHUNK_BYTES)
            if not chunk:
                return None
            self._received += chunk
        line, self._received = self._received.split(b"\n", 1)
        return json.loads(line)

    def write(self, content: dict[str, Any]) -> None:
        """Write a reply."""
        line = json.dumps(content).encode() + b"\n"
        while line:
            line = line[os.write(self.replies, line) :]

    def is_closed(self, seconds: float) -> bool:
        """Whether the requests ended. The parent sends one at a time, so nothing else arrives during one."""
        return bool(select.select([self.requests], [], [], seconds)[0])


def main() -> int:
    """Score until the requests end.

    Returns: 0, also when the parent has ended.
    """
    for number in _STOP_SIGNALS:
        # a handler, unlike SIG_IGN, does not reach the programs that a scoring function executes
        signal.signal(number, lambda *_: None)
    settings = WorkerSettings(**json.loads(sys.argv[1]))
    pipes = _Pipes()
    isolation = confine(
        Confinement(
            settings.scratch,
            settings.memory_bytes,
            settings.network,
            tuple(settings.readable_paths),
            settings.is_bubblewrapped,
        )
    )
    # a parent that was killed reads no reply
    with contextlib.suppress(BrokenPipeError):
        _serve(settings, pipes, isolation)
    return 0


def _serve(settings: WorkerSettings, pipes: _Pipes, isolation: Isolation) -> None:
    # imports the scoring libraries and the user's module, after the process is confined
    from megatron_q3n.rl import scoring_functions
    from megatron_q3n.rl.scoring_process import CRASH, ScoringRules, score_in_process

    is_extracted = settings.answer_pattern is not None
    rules = ScoringRules(
        scoring_functions.scoring_function(settings.kind, settings.function, is_extracted=is_extracted),
        settings.answer_pattern,
        settings.time_limit_seconds,
        settings.memory_bytes,
        may_start_processes=settings.kind == "function",
    )
    pipes.write({"ready": True, "isolation": isolation.as_tree()})
    while request := pipes.read():
        scoring_functions.prepare(settings.kind, request["arguments"])
        private = [pipes.requests, pipes.replies]
        scoring = (rules, request["text"], request["arguments"], private, pipes.is_closed)
        reply = score_in_process(*scoring)
        if reply == {"error": CRASH}:
            # another cause than the response, e.g. a machine short of memory, hardly occurs twice
            reply = score_in_process(*scoring)
        if pipes.is_closed(0):
            return
        pipes.write({"id": request["id"], **reply})


if __name__ == "__main__":
    sys.exit(main())
