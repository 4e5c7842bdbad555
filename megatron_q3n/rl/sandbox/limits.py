"""Resource limits of the sandbox, and the processes below this one: how many, how much memory, and their end."""

import contextlib
import os
import resource
import signal
from dataclasses import dataclass
from pathlib import Path

MAX_PROCESSES = 16
# while the process starts, and threads of its libraries
_SPARE_TASKS = 32
_MAX_FILE_BYTES = 64 << 20
_MAX_OPEN_FILES = 256
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# position of the parent's id after the program's name in /proc/PID/stat
_PARENT_FIELD = 1


@dataclass(frozen=True)
class Usage:
    """Processes below this one, and their resident memory together."""

    pids: list[int]
    resident_bytes: int


def limit_process(memory_bytes: int, *, counts_own_processes: bool) -> None:
    """Limit memory, file size and open files of this process and of each of its children; no core dumps.

    With `counts_own_processes` (a user namespace of an unprivileged user) the number of processes is limited as well;
    elsewhere the limit would count all processes of the user.
    """
    limits = {
        # heap and anonymous memory; files that libraries map do not count
        resource.RLIMIT_DATA: memory_bytes,
        resource.RLIMIT_FSIZE: _MAX_FILE_BYTES,
        resource.RLIMIT_NOFILE: _MAX_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if counts_own_processes:
        limits[resource.RLIMIT_NPROC] = MAX_PROCESSES + _SPARE_TASKS
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (bound, bound))


def end_first_when_memory_runs_out() -> None:
    """Have the kernel end this process and its children before the trainer, where memory runs out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def limit_cpu(seconds: int) -> None:
    """Limit the CPU time of this process."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def usage_below() -> Usage:
    """Return the processes below this one; where there is no /proc, none."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdecimal():
            with contextlib.suppress(OSError, IndexError):
                stat = Path(f"/proc/{name}/stat").read_text(encoding="utf-8", errors="replace")
                parents[int(name)] = int(stat.rpartition(")")[2].split()[_PARENT_FIELD])
    below = {os.getpid()}
    while found := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= found
    pids = sorted(below - {os.getpid()})
    return Usage(pids, sum(map(_resident_bytes, pids)))


def end_processes_below(child: int) -> None:
    """Kill a child and each process below this one, and wait for their end; PID 1 of a namespace kills them at once."""
    os.kill(child, signal.SIGKILL)
    while True:
        if os.getpid() == 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            for pid in usage_below().pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _resident_bytes(pid: int) -> int:
    try:
        resident_pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return 0
    return int(resident_pages) * _PAGE_BYTES
