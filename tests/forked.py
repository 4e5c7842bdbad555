"""Fork server for the project's programs: each runs in its own process without importing torch and megatron-core again.

The server imports these libraries when the first program is started, and forks one process per program
(multiprocessing's forkserver), which saves five to nine CPU-seconds each. After the fork a program behaves as if a user
had started it: it is `__main__`, with its own arguments, working folder, environment, output, signals and exit code. A
file started by its path imports by full names only: its folder is not on sys.path.

Decisions made during the import of those libraries are the same for all programs. Therefore a program with environment
variables of its own is started as a new Python process, and so is every program on a machine with a GPU, since a fork
cannot share a CUDA context. Tests of a start from nothing: tests/test_bad_input.py, tests/test_absent_packages.py,
tests/test_torchrun.py.
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
    """A program to start: arguments, working folder, environment and output files."""

    # a module by name, or a file
    program: str | Path
    arguments: list[str]
    cwd: Path
    environment: dict[str, str]
    stdout: Path
    stderr: Path


class Program:
    """A started program, with the part of subprocess.Popen's interface that tests need."""

    def __init__(self, launch: Launch, folder: tempfile.TemporaryDirectory[str], *, is_forked: bool) -> None:
        """Start the program; `folder` holds its output for the lifetime of this object."""
        self._launch, self._folder = launch, folder
        self._process: Any = _fork(launch) if is_forked else _spawn(launch)
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, -n if signal n ended the program, or None while it runs."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the program has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """Wait for the end, and return exit code and output.

        Raises: TimeoutExpired if the program takes longer; it is killed.
        """
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if code is None:
            self._process.kill()
        paths = (self._launch.stdout, self._launch.stderr)
        stdout, stderr = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
        command = [str(self._launch.program), *self._launch.arguments]
        if code is None:
            raise subprocess.TimeoutExpired(command, seconds, stdout, stderr)
        return subprocess.CompletedProcess(command, code, stdout, stderr)


def start(program: str | Path, *arguments: object, cwd: Path = ROOT, **environment: str) -> Program:
    """Start a module by name, or a file by path. `environment`: variables that differ from this process's."""
    folder = tempfile.TemporaryDirectory(prefix="forked.")
    stdout, stderr = (Path(folder.name) / name for name in ("stdout", "stderr"))
    launch = Launch(program, [str(word) for word in arguments], cwd, {**os.environ, **environment}, stdout, stderr)
    return Program(launch, folder, is_forked=not (HAS_GPU or environment))


def run(
    program: str | Path, *arguments: object, cwd: Path = ROOT, seconds: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a module by name, or a file by path, to its end. The caller checks the exit code."""
    return start(program, *arguments, cwd=cwd, **environment).wait(seconds)


def _spawn(launch: Launch) -> "subprocess.Popen[bytes]":
    module_option = ["-m"] if isinstance(launch.program, str) else []
    with launch.stdout.open("wb") as stdout, launch.stderr.open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, *module_option, str(launch.program), *launch.arguments],
            cwd=launch.cwd,
            env=launch.environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )


def _fork(launch: Launch) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.forked_imports"])
    launch.stdout.touch()
    launch.stderr.touch()
    process = context.Process(target=_run_program, args=(launch,))
    process.start()
    return process


def _run_program(launch: Launch) -> None:
    """Run the program in this forked process, as its `__main__`."""
    for number, output in enumerate((launch.stdout, launch.stderr), start=1):
        os.dup2(os.open(output, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(launch.environment)
    os.chdir(launch.cwd)
    sys.argv = [str(launch.program), *launch.arguments]
    try:
        if isinstance(launch.program, str):
            # the server may have imported it; here it is __main__
            sys.modules.pop(launch.program, None)
            runpy.run_module(launch.program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(launch.program), run_name="__main__")
    finally:
        # a forked process of multiprocessing ends without them
        atexit._run_exitfuncs()
