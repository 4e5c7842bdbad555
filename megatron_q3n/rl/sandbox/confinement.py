"""Confinement of this process: every measure that the machine has, and a report of what each one is.

    own session, bare environment     by the parent, rl/reward_workers.py
    namespaces                        users, mounts (read-only), processes, network, IPC; or entered by bubblewrap
    unprivileged user                 for root where namespaces are forbidden
    Landlock                          allow list of files; no other process's memory, environment or signals
    seccomp                           no sockets, no mounts, no other process's memory
    resource limits                   memory, file size, open files, CPU time, processes

Measures overlap on purpose: containers often forbid namespaces, and old kernels have no Landlock.
"""

import os
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from megatron_q3n.rl.sandbox import landlock, limits, namespaces, seccomp, syscalls

_UNPRIVILEGED_ID = 65534
_SYSTEM_PATHS = (
    *("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/proc", "/sys/devices/system"),
    *("/etc/ld.so.cache", "/etc/localtime", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/fonts"),
    *("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"),
)
_NETWORK_PATHS = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl", "/etc/pki", "/etc/ca-certificates")
_WRITABLE_DEVICES = ("/dev/null",)


@dataclass(frozen=True)
class Confinement:
    """What a confined process may have."""

    scratch: str
    memory_bytes: int
    network: bool
    readable_paths: tuple[str, ...] = ()
    is_bubblewrapped: bool = False


@dataclass(frozen=True)
class Isolation:
    """What confines a process, for environment.json, and what does not."""

    namespaces: str
    user: str
    files: str
    network: str
    processes: str
    refused: tuple[str, ...]
    missing: tuple[str, ...]

    def as_tree(self) -> dict[str, object]:
        """Return the fields as JSON values."""
        return asdict(self)


def confine(wanted: Confinement) -> Isolation:
    """Confine this process for good. It may continue in a child process, whose exit code the caller then exits with.

    Linux only; elsewhere nothing but the resource limits is applied.
    """
    refused: list[str] = []
    if sys.platform != "linux":
        limits.limit_process(wanted.memory_bytes, counts_own_processes=False)
        return _report(namespaces.Namespaces(), [], has_other_user=False, network=wanted.network)
    limits.end_first_when_memory_runs_out()
    entered = _enter_namespaces(wanted)
    is_root = os.geteuid() == 0
    has_other_user = is_root and not (entered.user or entered.pid) and _become_unprivileged(wanted.scratch)
    measures = []
    for name, apply in _measures(wanted).items():
        try:
            apply()
            measures.append(name)
        except OSError as error:
            refused.append(f"{name}: {error.strerror}")
    limits.limit_process(wanted.memory_bytes, counts_own_processes=entered.user and not is_root)
    report = _report(entered, measures, has_other_user=has_other_user, network=wanted.network)
    by = " by bubblewrap" if wanted.is_bubblewrapped else ""
    names, refusals = f"{report.namespaces}{by}", (*entered.refusals, *refused)
    return replace(report, namespaces=names, refused=refusals)


def _measures(wanted: Confinement) -> dict[str, Callable[[], object]]:
    """Return the measures in the order in which they must be applied."""
    measures: dict[str, Callable[[], object]] = {
        "no new privileges": lambda: syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1),
        "no capabilities": syscalls.drop_capabilities,
        "orphans adopted": lambda: syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1),
        "Landlock": lambda: landlock.restrict(
            _readable_paths(wanted), (wanted.scratch, *_WRITABLE_DEVICES), network=wanted.network
        ),
        # after the last file that a non-dumpable process may not open
        "not dumpable": lambda: syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0),
    }
    if seccomp.is_supported():
        measures["seccomp"] = lambda: seccomp.restrict(network=wanted.network)
    return measures


def _enter_namespaces(wanted: Confinement) -> namespaces.Namespaces:
    if wanted.is_bubblewrapped:
        return namespaces.Namespaces(user=True, mount=True, pid=True, network=not wanted.network)
    return namespaces.enter(wanted.scratch, network=wanted.network)


def _become_unprivileged(scratch: str) -> bool:
    """Change from root to an unprivileged user; not where that user cannot read Python and this package."""
    needed = [path for path in (os.path.realpath(sys.executable), __file__, *sys.path) if os.path.exists(path)]
    child = os.fork()
    if child == 0:
        try:
            _set_user()
        except OSError:
            os._exit(1)
        os._exit(0 if all(os.access(path, os.R_OK) for path in needed) else 1)
    if os.waitpid(child, 0)[1] != 0:
        return False
    os.chown(scratch, _UNPRIVILEGED_ID, _UNPRIVILEGED_ID)
    _set_user()
    return True


def _set_user() -> None:
    os.setgroups([])
    os.setresgid(_UNPRIVILEGED_ID, _UNPRIVILEGED_ID, _UNPRIVILEGED_ID)
    os.setresuid(_UNPRIVILEGED_ID, _UNPRIVILEGED_ID, _UNPRIVILEGED_ID)


def _readable_paths(wanted: Confinement) -> list[str]:
    """Return the files of Python, of the libraries, and on the import path."""
    python = [sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)), *sys.path]
    libraries = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if path]
    standard = list(sysconfig.get_paths().values())
    network = _NETWORK_PATHS if wanted.network else ()
    return [*python, *standard, *libraries, *_SYSTEM_PATHS, *network, *wanted.readable_paths]


def _report(entered: namespaces.Namespaces, measures: list[str], *, has_other_user: bool, network: bool) -> Isolation:
    has_landlock, has_seccomp = "Landlock" in measures, "seccomp" in measures
    abi = landlock.version() if has_landlock else 0
    missing = {
        "the trainer's environment and memory": not (entered.pid or entered.user or has_landlock or has_other_user),
        "files outside of the scoring": not (has_landlock or has_other_user),
        "writing files": not (entered.mount or has_landlock or has_other_user),
        "files that every user may read or write": has_other_user and not has_landlock,
        "the network": not (network or entered.network or has_seccomp),
        "signals to other processes": not (entered.pid or abi >= landlock.SIGNALS_ABI or has_other_user),
    }
    by = {
        "files": {
            "read-only mounts": entered.mount,
            f"Landlock ABI {abi}": has_landlock,
            "unprivileged user": has_other_user,
        },
        "network": {"allowed": network, "network namespace": entered.network, "seccomp": has_seccomp and not network},
        "processes": {"PID namespace": entered.pid, "seccomp": has_seccomp, "Landlock": has_landlock},
    }
    words = {name: ", ".join(word for word, holds in found.items() if holds) or "none" for name, found in by.items()}
    return Isolation(
        namespaces=entered.names() or "none",
        user="unprivileged user" if has_other_user else f"uid {os.geteuid()} without capabilities",
        **words,
        refused=(),
        missing=tuple(name for name, is_missing in missing.items() if is_missing),
    )
