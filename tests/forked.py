"""Programs of the project in processes of their own, without each of them importing torch and megatron-core again.

A server imports them when the first program is started, and forks one process per program (multiprocessing's
forkserver): five to nine CPU-seconds less for each. From the fork on a program is what a user starts: it is `__main__`,
with its own arguments, working folder, environment, output, signals and exit code.

What is decided while those libraries are imported cannot be told apart by program. So one that is given variables of
its own gets a whole process, and so does each where there is a GPU, since a fork cannot share a CUDA context. How a
program starts from nothing: test_bad_input.py, test_absent_packages.py, test_torchrun.py.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HAS_GPU = os.environ.get("CUDA_VISIBLE_DEVICES") != "" and Path("/dev/nvidiactl").exists()


@dataclass(frozen=True)
class Launch:
    """What is started, and where its output goes."""

    program: str | Path  # a module by name, or a file
    arguments: list[str]
    cwd: Path
    environment: dict[str, str]
    stdout: Path
    stderr: Path


class Program:
    """A program that was started; like subprocess.Popen, as far as tests need it."""

    def __init__(self, launch: Launch, folder: tempfile.TemporaryDirectory[str], whole: bool) -> None:
        """Start it, in a whole process or forked; `folder` holds its output as long as this lives."""
        self._launch, self._folder = launch, folder
        self._process: Any = _whole(launch) if whole else _forked(launch)
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs; -n if signal n ended it."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """Wait for its end, and return exit code and output; one that takes longer is killed, and that is an error."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if code is None:
            self._process.kill()
        paths = (self._launch.stdout, self._launch.stderr)
        stdout, stderr = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
        words = [str(self._launch.program), *self._launch.arguments]
        if code is None:
            raise subprocess.TimeoutExpired(words, seconds, stdout, stderr)
        return subprocess.CompletedProcess(words, code, stdout, stderr)


def start(program: str | Path, *arguments: object, cwd: Path = ROOT, **environment: str) -> Program:
    """Start a module by name, or a file by path. `environment`: what differs from this process's own."""
    folder = tempfile.TemporaryDirectory(prefix="forked.")
    stdout, stderr = (Path(folder.name) / name for name in ("stdout", "stderr"))
    words = [str(word) for word in arguments]
    launch = Launch(program, words, cwd, {**os.environ, **environment}, stdout, stderr)
    return Program(launch, folder, whole=HAS_GPU or bool(environment))


def run(
    program: str | Path, *arguments: object, cwd: Path = ROOT, seconds: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a module by name, or a file by path, to its end. The exit code is the caller's to check."""
    return start(program, *arguments, cwd=cwd, **environment).wait(seconds)


def _whole(launch: Launch) -> "subprocess.Popen[bytes]":
    by_name = ["-m"] if isinstance(launch.program, str) else []
    with launch.stdout.open("wb") as stdout, launch.stderr.open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, *by_name, str(launch.program), *launch.arguments],
            cwd=launch.cwd,
            env=launch.environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )


def _forked(launch: Launch) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.forked_imports"])
    launch.stdout.touch()
    launch.stderr.touch()
    process = context.Process(target=_become, args=(launch,))
    process.start()
    return process


def _become(launch: Launch) -> None:
    """Turn this fork into the program."""
    for number, output in enumerate((launch.stdout, launch.stderr), start=1):
        os.dup2(os.open(output, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(launch.environment)
    os.chdir(launch.cwd)
    sys.argv = [str(launch.program), *launch.arguments]
    try:
        if isinstance(launch.program, str):
            sys.modules.pop(launch.program, None)  # the server's; this one is __main__
            runpy.run_module(launch.program, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(launch.program.parent))
            runpy.run_path(str(launch.program), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which the end of a fork leaves out
