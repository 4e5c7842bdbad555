"""Landlock: an allow list of files for this process and its children, without privileges (Linux 5.13 and later).

It also keeps them from processes outside of the list's domain (ptrace, /proc/PID/environ), from TCP (ABI 4) and from
signals to other processes (ABI 6). Reference: Documentation/userspace-api/landlock.rst of the kernel.
"""

import ctypes
import os
import struct
from collections.abc import Iterable

from megatron_q3n.rl.sandbox import syscalls

SIGNALS_ABI = 6
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
# from removing directories (bit 4) to making symbolic links (bit 12)
_CHANGE_FOLDERS = sum(1 << bit for bit in range(4, 13))
_REFER, _TRUNCATE, _IOCTL_DEVICE = 1 << 13, 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE
_TCP = 0b11
_SCOPES = 0b11


def version() -> int:
    """Return the kernel's Landlock ABI; 0 if it has none."""
    try:
        return syscalls.call(_CREATE_RULESET, None, 0, 1)
    except OSError:
        return 0


def restrict(readable: Iterable[str], writable: Iterable[str], *, network: bool) -> None:
    """Allow reading and execution below `readable`, everything below `writable`, and no other file.

    Paths that do not exist are left out. The process must have no_new_privs.
    Raises: OSError.
    """
    abi = version()
    handled = _EXECUTE | _WRITE_FILE | _READ_FILE | _READ_DIR | _CHANGE_FOLDERS
    handled |= (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0) | (_IOCTL_DEVICE if abi >= 5 else 0)
    fields = [handled]
    if abi >= 4:
        fields.append(0 if network else _TCP)
    if abi >= SIGNALS_ABI:
        fields.append(_SCOPES)
    attributes = ctypes.create_string_buffer(struct.pack(f"={len(fields)}Q", *fields), 8 * len(fields))
    ruleset = syscalls.call(_CREATE_RULESET, attributes, len(attributes), 0)
    for path in readable:
        _allow(ruleset, path, handled & (_EXECUTE | _READ_FILE | _READ_DIR))
    for path in writable:
        _allow(ruleset, path, handled & ~(_EXECUTE | _IOCTL_DEVICE))
    syscalls.call(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    if not os.path.isdir(path):
        rights &= _FILE_RIGHTS
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, descriptor), 12)
    syscalls.call(_ADD_RULE, ruleset, 1, rule, 0)
    os.close(descriptor)
