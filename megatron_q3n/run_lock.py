"""Lock of a run directory, `logs/run.lock`: one training at a time writes into it.

The leader holds a POSIX record lock (fcntl) on the file. The kernel releases it when the process ends, however it ends,
and children of the process do not inherit it, as they would a flock. On NFS and Lustre such locks hold between machines
if the file system is mounted for it, which is not certain. Therefore the owner also renews the file every ten seconds,
and a process on another machine waits to see whether it is renewed:

| the file names | lock obtained | result |
|---|---|---|
| no owner | yes | locked |
| a process of this machine, or of an earlier start of this Slurm job | yes | that process has ended: locked |
| a process of this machine | no | refused |
| a process of another machine | either | refused once it is renewed |
| a process of another machine | yes | locked after 45 s without renewal |
| a process of another machine | no | refused after 150 s: NFS keeps the locks of a lost machine for 90 s |

No module of this process may open and close the file while the lock is held: closing any handle of a file releases a
process's record locks on it.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_q3n.config import RunInUseError, UserError, launch

LOCK_FILE = "logs/run.lock"
# the content has a fixed length, so that renewing it needs no space on a full disk
_CONTENT_BYTES = 512
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class LockTimes:
    """Seconds between renewals, until a silent owner has ended, and until the lock of a lost machine must be gone."""

    renewal: float = 10.0
    silent: float = 45.0
    lease: float = 150.0


@dataclass(frozen=True)
class Owner:
    """The process that the file names."""

    machine: str
    host: str
    pid: int
    job: str | None
    job_restarts: int

    @classmethod
    def this_process(cls) -> "Owner":
        """Return this process. `machine` changes with every boot; containers of one machine share it."""
        machine = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else platform.node()
        job, restarts = launch.job() or (None, 0)
        return cls(machine, platform.node(), os.getpid(), job, restarts)

    def is_earlier_start_of(self, other: "Owner") -> bool:
        """Whether the other is a later start of the same Slurm job: Slurm starts a job again once it has ended."""
        return self.job is not None and self.job == other.job and self.job_restarts < other.job_restarts

    def __str__(self) -> str:
        job = f" of Slurm job {self.job}" if self.job else ""
        return f"process {self.pid}{job} on {self.host}"


class RunLock:
    """Lock of one run directory, held from `acquire` to `release` or to the end of the process."""

    def __init__(self, run_dir: Path, times: LockTimes = LockTimes()) -> None:
        self._path, self._times = run_dir / LOCK_FILE, times
        self._this = Owner.this_process()
        self._is_released = threading.Event()
        self._handle = -1

    def acquire(self) -> str | None:
        """Lock the directory; return a message if a lock left by another process was taken over.

        Raises: RunInUseError if another process trains in the directory; UserError if the file cannot be written.
        """
        began, first = time.monotonic(), None
        while True:
            handle = self._open()
            is_locked, is_certain = _try_lock(handle)
            content = os.pread(handle, _CONTENT_BYTES, 0)
            owner, waited = _parse(content), time.monotonic() - began
            if is_locked and self._has_ended(owner, waited, is_certain=is_certain):
                self._hold(handle)
                return f"{self._path} was left by {owner}, which has ended; taken over" if owner else None
            os.close(handle)
            is_renewed = first is not None and content != first
            self._refuse_if_used(owner, waited, is_locked=is_locked, is_renewed=is_renewed)
            if first is None:
                first = content
                print(f"{self._path} names {owner}: waiting to see whether it still runs", file=sys.stderr)
            time.sleep(self._times.renewal / 4)

    def release(self) -> None:
        """Release the lock and remove the owner from the file; nothing to do if it is not held."""
        if self._handle < 0:
            return
        self._is_released.set()
        self._renewals.join()
        # the file may be on a disk that is gone; the kernel releases the lock in any case
        with contextlib.suppress(OSError):
            os.pwrite(self._handle, b" " * _CONTENT_BYTES, 0)
        os.close(self._handle)
        self._handle = -1

    def _open(self) -> int:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._cannot_write(error) from None

    def _has_ended(self, owner: Owner | None, waited: float, *, is_certain: bool) -> bool:
        """Return whether the owner named in a file that this process has locked has ended."""
        if owner is None or owner.is_earlier_start_of(self._this):
            return True
        return (is_certain and owner.machine == self._this.machine) or waited >= self._times.silent

    def _refuse_if_used(self, owner: Owner | None, waited: float, *, is_locked: bool, is_renewed: bool) -> None:
        is_here = owner is None or owner.machine == self._this.machine
        is_stuck = not is_locked and waited >= self._times.lease
        if is_renewed or is_stuck or (is_here and not is_locked):
            raise RunInUseError(
                f"{self._path.parent.parent} is in use by {owner or 'another process'}: two processes cannot train in "
                "one run directory. Nothing was changed. Wait until it has ended, or start a run in another run_dir"
                + (f"; if it no longer exists, delete {self._path}." if is_stuck else ".")
            )

    def _hold(self, handle: int) -> None:
        """Write this process as the owner, and renew that until released."""
        try:
            os.pwrite(handle, self._content(0), 0)
        except OSError as error:
            os.close(handle)
            raise self._cannot_write(error) from None
        self._handle = handle
        self._renewals = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._renewals.start()

    def _renew(self) -> None:
        number = 0
        while not self._is_released.wait(self._times.renewal):
            number += 1
            # a disk that does not answer now may do so at the next renewal; the training reports it
            with contextlib.suppress(OSError):
                os.pwrite(self._handle, self._content(number), 0)

    def _content(self, number: int) -> bytes:
        return json.dumps({**asdict(self._this), "renewals": number}).encode().ljust(_CONTENT_BYTES)

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(
            f"run directory {self._path.parent.parent} cannot be written: {self._path}: {error.strerror}. Choose "
            "another with run_dir=… or runs_dir=…, or free space and correct the permissions."
        )


def _try_lock(handle: int) -> tuple[bool, bool]:
    """Return whether the lock was obtained, and whether that is certain: a file system may have no locks."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _UNSUPPORTED, False
    return True, True


def _parse(content: bytes) -> Owner | None:
    """Return the owner named in the file; None if it names none."""
    try:
        fields: dict[str, Any] = json.loads(content)
        return Owner(**{name: fields[name] for name in Owner.__dataclass_fields__})
    except (ValueError, KeyError, TypeError):
        return None
