"""Scores from processes that may hang or crash: each answer has a time limit, and a bad one costs itself only.

A process that misses its limit or dies is replaced, and its answer gets the rule's score and a failure that
is counted. Answers that pattern and rule decide (no answer found) reach no process.
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

START_SECONDS = 120  # importing reasoning-gym and math-verify, on a busy machine
ROOT = Path(__file__).parent.parent.parent
_CHUNK = 1 << 16


class GradingFailure(Exception):
    """Grading one answer failed; the message says how."""


class _Process:
    """One grading process."""

    def __init__(self, settings: RewardConfig) -> None:
        command = [sys.executable, "-m", "megatron_q3n.rl.grading_process", settings.kind]
        path = os.pathsep.join([str(ROOT), os.getcwd(), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            command + ([settings.function] if settings.function else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "CUDA_VISIBLE_DEVICES": ""},
        )
        self._read = b""
        self.is_ready = False

    def grade(self, request: dict[str, Any], seconds: float) -> float:
        """Return the score.

        Raises: GradingFailure; the process is dead then if it hung or crashed.
        """
        if not self.is_ready:
            self._reply(START_SECONDS)
            self.is_ready = True
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise GradingFailure("crash") from None
        reply = self._reply(seconds)
        if "error" in reply:
            raise GradingFailure(reply["error"])
        return reply["score"]

    def kill(self) -> None:
        """End it, and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _reply(self, seconds: float) -> dict[str, Any]:
        """Return the next line, read byte by byte as it comes: a reply may be cut by a crash."""
        assert self._process.stdout is not None
        file, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._read:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([file], [], [], left)[0]:
                self._process.kill()
                raise GradingFailure("time limit")
            part = os.read(file, _CHUNK)
            if not part:
                self._process.wait()
                raise GradingFailure("crash")
            self._read += part
        line, self._read = self._read.split(b"\n", 1)
        return json.loads(line)


class Graders:
    """The grading processes of a rank; a context manager that ends them."""

    def __init__(self, settings: RewardConfig) -> None:
        self._settings = settings
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all = [_Process(settings) for _ in range(settings.workers)]
        for process in self._all:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(settings.workers, thread_name_prefix="grading")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._all:
            process.kill()

    def score(self, samples: list[Sample]) -> None:
        """Give each sample its score, or the rule's and the failure.

        Raises: UserError if the first process cannot even start: the grader is not there.
        """
        list(self._threads.map(self._score, samples))

    def _score(self, sample: Sample) -> None:
        answer = self._answer_in(sample.text)
        if answer is None:
            sample.score, sample.failure = self._settings.failed, "no answer found"
            return
        process = self._idle.get()
        try:
            request = {"answer": answer, "grading": sample.prompt.grading}
            sample.score = process.grade(request, self._settings.time_limit_seconds)
            sample.failure = None
        except GradingFailure as failure:
            sample.score, sample.failure = self._settings.failed, str(failure)
            if str(failure) in ("crash", "time limit"):
                process = self._replace(process)
        finally:
            self._idle.put(process)

    def _replace(self, dead: _Process) -> _Process:
        was_ready = dead.is_ready
        dead.kill()
        if not was_ready:
            wanted = self._settings.function or self._settings.kind
            raise UserError(
                f"rl.reward: the grading process of {wanted} does not start; its own words are above. A function is "
                "found from the working folder and PYTHONPATH."
            )
        fresh = _Process(self._settings)
        self._all[self._all.index(dead)] = fresh
        return fresh

    def _answer_in(self, text: str) -> str | None:
        if self._settings.answer_pattern is None:
            return text.strip()
        found = list(re.finditer(self._settings.answer_pattern, text))
        return found[-1][1] if found else None
