"""Reward workers: a pool of scoring processes that may hang or crash, with a time limit for each response.

A process that exceeds the limit or crashes is replaced; its response gets `rl.reward.failure_score` and a failure that
is counted. Responses in which `rl.reward.answer_pattern` finds no answer are not sent to a process.
"""

import json
import os
import queue
import re
import select
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_q3n.config import UserError
from megatron_q3n.config.rl import RewardConfig
from megatron_q3n.rl.samples import Sample

# importing reasoning-gym and math-verify, on a busy machine
START_SECONDS = 120
ROOT = Path(__file__).parent.parent.parent
CRASH, TIME_LIMIT = "crash", "time limit"
_CHUNK_BYTES = 1 << 16


class ScoringFailure(Exception):
    """A response could not be scored; the message is the reason."""


class _WorkerProcess:
    """One scoring worker process."""

    def __init__(self, settings: RewardConfig) -> None:
        command = [sys.executable, "-m", "megatron_q3n.rl.scoring_worker", settings.kind]
        path = os.pathsep.join([str(ROOT), os.getcwd(), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            command + ([settings.function] if settings.function else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "CUDA_VISIBLE_DEVICES": ""},
        )
        self._received = b""
        self.is_ready = False

    def score(self, request: dict[str, Any], limit_seconds: float) -> float:
        """Return the score.

        Raises: ScoringFailure; after "crash" or "time limit" the process is dead.
        """
        if not self.is_ready:
            self._reply(START_SECONDS)
            self.is_ready = True
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ScoringFailure(CRASH) from None
        reply = self._reply(limit_seconds)
        if "error" in reply:
            raise ScoringFailure(reply["error"])
        return reply["score"]

    def kill(self) -> None:
        """Kill the process and wait for its end."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _reply(self, limit_seconds: float) -> dict[str, Any]:
        """Return the next line, read as raw bytes because a crash may truncate it."""
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + limit_seconds
        while b"\n" not in self._received:
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0 or not select.select([descriptor], [], [], seconds_left)[0]:
                self._process.kill()
                raise ScoringFailure(TIME_LIMIT)
            chunk = os.read(descriptor, _CHUNK_BYTES)
            if not chunk:
                self._process.wait()
                raise ScoringFailure(CRASH)
            self._received += chunk
        line, self._received = self._received.split(b"\n", 1)
        return json.loads(line)


class RewardWorkers:
    """The scoring worker processes of a rank; a context manager that ends them."""

    def __init__(self, settings: RewardConfig) -> None:
        self._settings = settings
        self._idle: queue.SimpleQueue[_WorkerProcess] = queue.SimpleQueue()
        self._processes = [_WorkerProcess(settings) for _ in range(settings.workers)]
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(settings.workers, thread_name_prefix="scoring")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.kill()

    def score(self, samples: list[Sample]) -> None:
        """Set each sample's score, or the failure score and the reason.

        Raises: UserError if a process does not start, because the scoring function cannot be imported.
        """
        list(self._threads.map(self._score, samples))

    def _score(self, sample: Sample) -> None:
        answer = self._extract_answer(sample.text)
        if answer is None:
            sample.score, sample.failure = self._settings.failure_score, "no answer found"
            return
        process = self._idle.get()
        try:
            request = {"answer": answer, "arguments": sample.prompt.scoring_arguments}
            sample.score = process.score(request, self._settings.time_limit_seconds)
            sample.failure = None
        except ScoringFailure as failure:
            sample.score, sample.failure = self._settings.failure_score, str(failure)
            if str(failure) in (CRASH, TIME_LIMIT):
                process = self._replace(process)
        finally:
            self._idle.put(process)

    def _replace(self, dead: _WorkerProcess) -> _WorkerProcess:
        was_ready = dead.is_ready
        dead.kill()
        if not was_ready:
            name = self._settings.function or self._settings.kind
            raise UserError(
                f"rl.reward: the scoring worker process of {name} does not start; its error output is above. A "
                "function is imported from the working folder or PYTHONPATH."
            )
        fresh = _WorkerProcess(self._settings)
        self._processes[self._processes.index(dead)] = fresh
        return fresh

    def _extract_answer(self, text: str) -> str | None:
        if self._settings.answer_pattern is None:
            return text.strip()
        matches = list(re.finditer(self._settings.answer_pattern, text))
        return matches[-1][1] if matches else None
