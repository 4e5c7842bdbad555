"""Linux system calls that Python's os module lacks, through libc: prctl, mount, capset, and any call by its number."""

import ctypes
import os

PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 22, 36, 38
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20, 0x1000, 0x4000, 0x40000
_CAPABILITY_VERSION_3 = 0x20080522
_LIBC = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: object) -> int:
    """Make a system call; integers are passed as 64 bits, buffers by address.

    Raises: OSError.
    """
    return _checked(_LIBC.syscall(ctypes.c_long(number), *map(_argument, arguments)))


def prctl(option: int, *arguments: object) -> None:
    """Set an attribute of the process.

    Raises: OSError.
    """
    padded = [*arguments, 0, 0, 0, 0][:4]
    _checked(_LIBC.prctl(ctypes.c_int(option), *map(_argument, padded)))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Mount or remount.

    Raises: OSError.
    """
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _checked(_LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]))


def drop_capabilities() -> None:
    """Give up all capabilities; with no_new_privs, no program that is executed later regains them.

    Raises: OSError.
    """
    header, data = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _checked(_LIBC.capset(header, data))


def _argument(value: object) -> object:
    return ctypes.c_long(value) if isinstance(value, int) else value


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
