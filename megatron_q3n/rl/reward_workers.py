"""Reward workers: a pool of scoring worker processes, which are confined, may hang or crash, and are replaced.

Responses are model output, and scoring functions evaluate them: the processes have a bare environment, a session of
their own (Ctrl-C does not reach them), and confine themselves (sandbox/confinement.py). A reply must carry the id of
its request; anything else ends the process. A response whose scoring fails gets the reason, and no other is affected.
"""

import contextlib
import json
import os
import queue
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_q3n.config import UserError
from megatron_q3n.config.rl import RewardConfig
from megatron_q3n.rl.samples import NO_ANSWER, Sample
from megatron_q3n.rl.scoring_worker import WorkerSettings

# importing reasoning-gym and math-verify, on a busy machine
START_SECONDS = 120
# beyond the time limit, which the worker process enforces itself
GRACE_SECONDS = 10
CRASH, TIME_LIMIT = "crash", "time limit"
ROOT = Path(__file__).parent.parent.parent
# processes that a response gets if they end under it
_ATTEMPTS = 2
_SHELL_SIGNALS = 128
_CHUNK_BYTES, _MAX_REPLY_BYTES = 1 << 16, 1 << 20
# variables that Python, libraries and the loader need; no other reaches a worker process
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ")
# where bubblewrap is installed and allowed, it enters the namespaces; with set-uid also where users may not
_BUBBLEWRAP = (
    *("bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent", "--as-pid-1"),
    *("--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--size", str(64 << 20), "--tmpfs"),
)

Command = Callable[[str], list[str]]


class ScoringFailure(Exception):
    """A response could not be scored; the message is the reason."""


class _WorkerEnded(Exception):
    """The worker process ended, or had written what belongs to no request before it received one.

    A response is scored in a process of its own, so it is hardly the cause.
    """


class WorkerProcess:
    """One scoring worker process, with a folder for its temporary files."""

    def __init__(self, command: Command, variables: dict[str, str]) -> None:
        """Start the process. `command` is a function of the folder."""
        self._scratch = tempfile.mkdtemp(prefix="scoring-")
        self._process = subprocess.Popen(
            command(self._scratch),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={"HOME": self._scratch, "TMPDIR": self._scratch, **variables},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        os.set_blocking(self._requests.fileno(), False)
        self._received = b""
        self.ready: dict[str, Any] | None = None

    def wait_until_ready(self) -> dict[str, Any]:
        """Return the process's first reply.

        Raises: ScoringFailure if it does not start.
        """
        if self.ready is None:
            try:
                self.ready = self._reply(time.monotonic() + START_SECONDS)
            except _WorkerEnded:
                raise ScoringFailure(CRASH) from None
        return self.ready

    def score(self, text: str, arguments: dict[str, Any], limit_seconds: float) -> dict[str, Any]:
        """Return the reply to one request.

        Raises: ScoringFailure or _WorkerEnded; the process must then be replaced.
        """
        if self._received or select.select([self._replies], [], [], 0)[0]:
            raise _WorkerEnded
        number, deadline = secrets.token_hex(8), time.monotonic() + limit_seconds + GRACE_SECONDS
        self._send({"id": number, "text": text, "arguments": arguments}, deadline)
        reply = self._reply(deadline)
        if reply.pop("id", None) != number or self._received:
            raise ScoringFailure("a reply that belongs to no request")
        return reply

    def kill(self) -> None:
        """Kill the process and its session; the group's number is not reused while a member of it exists."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """End the process and all below it, and remove its folder."""
        with contextlib.suppress(OSError):
            self._requests.close()
        # the end of the requests ends it in order, including processes that left its session
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self.kill()
        self._process.wait()
        self._replies.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended the process, which a shell's exit codes above 128 stand for too."""
        code = self._process.returncode
        return code is not None and (code < 0 or code > _SHELL_SIGNALS)

    def _send(self, request: dict[str, Any], deadline: float) -> None:
        unsent = json.dumps(request).encode() + b"\n"
        while unsent:
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0 or not select.select([], [self._requests], [], seconds_left)[1]:
                raise ScoringFailure(TIME_LIMIT)
            try:
                unsent = unsent[os.write(self._requests.fileno(), unsent) :]
            except BrokenPipeError:
                raise _WorkerEnded from None

    def _reply(self, deadline: float) -> dict[str, Any]:
        """Return the next line, read as raw bytes because a crash may truncate it."""
        while b"\n" not in self._received:
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0 or not select.select([self._replies], [], [], seconds_left)[0]:
                raise ScoringFailure(TIME_LIMIT)
            chunk = os.read(self._replies.fileno(), _CHUNK_BYTES)
            if not chunk:
                raise _WorkerEnded
            if len(self._received) > _MAX_REPLY_BYTES:
                raise ScoringFailure("a reply that is too long")
            self._received += chunk
        line, self._received = self._received.split(b"\n", 1)
        try:
            reply = json.loads(line)
        except ValueError:
            raise ScoringFailure("a reply that is not JSON") from None
        if not isinstance(reply, dict):
            raise ScoringFailure("a reply of another form")
        return reply


class RewardWorkers:
    """The scoring worker processes of a rank; a context manager that ends them."""

    def __init__(self, settings: RewardConfig, command: Command | None = None) -> None:
        """Start the processes; tests pass another command."""
        self._settings = settings
        self._command = command or _command(settings)
        self._variables = worker_variables(settings)
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        self._processes = [self._start() for _ in range(settings.workers)]
        for process in self._processes:
            self._idle.put(process)
        self._is_closing = False
        self._threads = ThreadPoolExecutor(settings.workers, thread_name_prefix="scoring")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._is_closing = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        # a response that is still being scored, after an interrupt, ends with its process
        if self._idle.qsize() < len(self._processes):
            for process in self._processes:
                process.kill()
        self._threads.shutdown(wait=True)
        for process in self._processes:
            process.end()

    def wait_until_ready(self) -> dict[str, Any]:
        """Return what confines the processes, the fields of `sandbox.confinement.Isolation`.

        Raises: UserError if a process does not start, because the scoring function cannot be imported.
        """
        processes = [self._idle.get() for _ in self._processes]
        isolation: dict[str, Any] = {}
        for process in processes:
            ready = self._ready(process)
            isolation = ready.wait_until_ready()["isolation"]
            self._idle.put(ready)
        return isolation

    def score(self, samples: list[Sample]) -> None:
        """Set each sample's score, or the failure score and the reason.

        Raises: UserError if a process does not start, because the scoring function cannot be imported.
        """
        list(self._threads.map(self._score, samples))

    def _score(self, sample: Sample) -> None:
        process = self._idle.get()
        try:
            process, reply = self._reply(process, sample)
        finally:
            self._idle.put(process)
        if "score" in reply:
            sample.score, sample.failure = reply["score"], None
        else:
            sample.score = self._settings.failure_score
            sample.failure = NO_ANSWER if "no_answer" in reply else reply["error"]

    def _reply(self, process: WorkerProcess, sample: Sample) -> tuple[WorkerProcess, dict[str, Any]]:
        """Return the reply for a sample, and the process that gave it or that replaces it."""
        limit, arguments = self._settings.time_limit_seconds, sample.prompt.scoring_arguments
        for _ in range(_ATTEMPTS):
            process = self._ready(process)
            try:
                return process, process.score(sample.text, arguments, limit)
            except _WorkerEnded:
                process = self._replace(process)
            except ScoringFailure as failure:
                return self._replace(process), {"error": str(failure)}
        return process, {"error": CRASH}

    def _ready(self, process: WorkerProcess) -> WorkerProcess:
        """Return a process that has started: this one, or one that replaces it if a signal ended it.

        Raises: UserError if it does not start.
        """
        reason = ""
        for _ in range(_ATTEMPTS):
            try:
                process.wait_until_ready()
            except ScoringFailure as failure:
                ended, reason = process, str(failure)
                process = self._replace(ended)
                if not (reason == CRASH and ended.was_killed):
                    break
            else:
                return process
        name = self._settings.function or self._settings.kind
        raise UserError(
            f"rl.reward: the scoring worker process of {name} does not start ({reason}); its error output is "
            "above. A function is imported from the working folder or PYTHONPATH, without network, with "
            f"rl.reward.memory_gib={self._settings.memory_gib:g} GiB of memory, and reads only files there "
            "and below rl.reward.readable_paths."
        )

    def _replace(self, ended: WorkerProcess) -> WorkerProcess:
        if self._is_closing:
            return ended
        ended.end()
        fresh = self._start()
        self._processes[self._processes.index(ended)] = fresh
        return fresh

    def _start(self) -> WorkerProcess:
        return WorkerProcess(self._command, self._variables)


def worker_variables(settings: RewardConfig) -> dict[str, str]:
    """Return the environment of a worker process: what Python needs, and `rl.reward.environment`.

    Raises: UserError for a variable that is not set.
    """
    if absent := [name for name in settings.environment if name not in os.environ]:
        raise UserError(f"rl.reward.environment: {', '.join(absent)} is not set in the environment of this run.")
    kept = {name: os.environ[name] for name in (*_KEPT_VARIABLES, *settings.environment) if name in os.environ}
    path = os.pathsep.join([str(ROOT), os.getcwd(), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    fixed = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return kept | fixed | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def _command(settings: RewardConfig) -> Command:
    """Return the command of a worker process, in bubblewrap where that works."""
    prefix = _bubblewrap(settings)

    def command(scratch: str) -> list[str]:
        worker = WorkerSettings(
            kind=settings.kind,
            function=settings.function,
            answer_pattern=settings.answer_pattern,
            time_limit_seconds=settings.time_limit_seconds,
            memory_bytes=int(settings.memory_gib * 2**30),
            network=settings.network,
            readable_paths=tuple(os.path.abspath(os.path.expanduser(path)) for path in settings.readable_paths),
            scratch=scratch,
            is_bubblewrapped=bool(prefix),
        )
        program = [sys.executable, "-m", "megatron_q3n.rl.scoring_worker", worker.as_json()]
        return [*prefix, scratch, "--", *program] if prefix else program

    return command


def _bubblewrap(settings: RewardConfig) -> list[str]:
    """Return bubblewrap's command line up to the folder for temporary files; nothing where it does not work."""
    if shutil.which(_BUBBLEWRAP[0]) is None:
        return []
    prefix = [*_BUBBLEWRAP[:1], *([] if settings.network else ["--unshare-net"]), *_BUBBLEWRAP[1:]]
    tried = subprocess.run(
        [*prefix, tempfile.gettempdir(), "--", sys.executable, "-c", ""],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return prefix if tried.returncode == 0 else []
