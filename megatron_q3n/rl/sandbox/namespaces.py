"""Namespaces for the sandbox: own users, processes, mounts, network and IPC, as many as the machine permits.

In the mount namespace every file is read-only, except a small tmpfs. In the PID namespace the calling process becomes
PID 1: its end ends all processes below it, and /proc shows no others. Variants are tried in forked processes, because
a namespace that was entered cannot be left.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from megatron_q3n.rl.sandbox import syscalls

TMPFS_OPTIONS = "size=64m,nr_inodes=4096,mode=700"
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_LOCKED_OPTIONS = {"nosuid": syscalls.MS_NOSUID, "nodev": syscalls.MS_NODEV, "noexec": syscalls.MS_NOEXEC}
_ATIME_OPTIONS = {"noatime": 0x400, "nodiratime": 0x800, "relatime": 0x200000}


@dataclass(frozen=True)
class Namespaces:
    """What was entered. `refusals` holds the reasons why stronger variants were not."""

    user: bool = False
    mount: bool = False
    pid: bool = False
    network: bool = False
    refusals: tuple[str, ...] = ()

    def names(self) -> str:
        """Return the namespaces as text."""
        return ", ".join(name for name in ("user", "mount", "pid", "network") if getattr(self, name))


def enter(scratch: str, *, network: bool) -> Namespaces:
    """Enter the strongest variant; `scratch` becomes the tmpfs. With `network`, the machine's network stays.

    The calling process waits for the confined one, which is a child of it, and exits with its code. It returns only
    where no variant is permitted.
    """
    refusals: list[str] = []
    for user, pid in ((True, True), (False, True), (True, False)):
        wanted = Namespaces(user, True, pid, not network, tuple(refusals))
        refusal = _try(lambda wanted=wanted: _enter(wanted, scratch))  # type: ignore[misc]
        if refusal is None:
            return wanted
        refusals.append(f"{wanted.names()}: {refusal}")
    return Namespaces(refusals=tuple(refusals))


def _try(enter_all: Callable[[], None]) -> str | None:
    """Run in a child process; there, return None if it succeeds. In the parent, return the reason if it fails."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        try:
            enter_all()
        except OSError as error:
            os.write(sender, f"{error.strerror}".encode())
            os._exit(1)
        os.write(sender, b"entered")
        os.close(sender)
        return None
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        reason = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if reason == "entered":
        os._exit(_exit_code(status))
    return reason or "the process ended"


def _exit_code(status: int) -> int:
    """Return a child's exit code, as a shell does: above 128 if a signal ended it."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _enter(wanted: Namespaces, scratch: str) -> None:
    flags = os.CLONE_NEWNS | os.CLONE_NEWIPC | os.CLONE_NEWUTS
    flags |= os.CLONE_NEWUSER if wanted.user else 0
    flags |= os.CLONE_NEWPID if wanted.pid else 0
    flags |= os.CLONE_NEWNET if wanted.network else 0
    uid, gid = os.geteuid(), os.getegid()
    os.unshare(flags)
    if wanted.user:
        for name, content in (("setgroups", "deny"), ("gid_map", f"{gid} {gid} 1"), ("uid_map", f"{uid} {uid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(content)
    if wanted.pid and (child := os.fork()):
        _, status = os.waitpid(child, 0)
        os._exit(_exit_code(status))
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    _make_read_only()
    options = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("tmpfs", scratch, "tmpfs", options, TMPFS_OPTIONS)
    if wanted.pid:
        syscalls.mount("proc", "/proc", "proc", options | syscalls.MS_NOEXEC)


def _make_read_only() -> None:
    """Make every mount read-only, at once or, before Linux 5.12, one by one."""
    attributes = (syscalls.MS_RDONLY | syscalls.MS_NOSUID).to_bytes(8, "little") + bytes(24)
    try:
        syscalls.call(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, len(attributes))
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        remount_one_by_one()


def remount_one_by_one() -> None:
    """Make every mount of the mount namespace read-only; options that are locked are kept.

    Raises: OSError.
    """
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = [line.split() for line in file]
    for fields in mounts:
        target = fields[4].encode("utf-8", "surrogateescape").decode("unicode_escape")
        options = fields[5].split(",")
        flags = syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY | syscalls.MS_NOSUID
        for name, flag in (_LOCKED_OPTIONS | _ATIME_OPTIONS).items():
            flags |= flag if name in options else 0
        try:
            syscalls.mount(None, target, None, flags)
        except (FileNotFoundError, PermissionError):
            # another mount hides this one; one that stays writable is left to Landlock and the file's owner
            continue
