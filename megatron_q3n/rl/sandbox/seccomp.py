"""Seccomp filters: system calls that fail with EPERM in this process and its children, without privileges.

Filters add up and cannot be removed. References: Documentation/userspace-api/seccomp_filter.rst; call numbers:
arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of the kernel.
"""

import ctypes
import errno
import platform
import struct
from collections.abc import Iterable

from megatron_q3n.rl.sandbox import syscalls

# name -> numbers on x86_64 and aarch64; None where an architecture lacks it
_CALLS: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "swapon": (167, 224),
    "reboot": (169, 142),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "sethostname": (170, 161),
    "syslog": (103, 116),
    # memory that no resource limit counts
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "clone": (56, 220),
    "clone3": (435, 435),
    "landlock_create_ruleset": (444, 444),
}
PROCESS_CALLS = ("fork", "vfork", "execve", "execveat")
_NOT_ALWAYS = ("socket", "clone", "clone3", "landlock_create_ruleset", *PROCESS_CALLS)
_ALWAYS = tuple(name for name in _CALLS if name not in _NOT_ALWAYS)
# audit architecture and position in the table; x86_64 also has the x32 calls, from this number on
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_X32_CALLS = 0x40000000
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_NAMESPACES, _CLONE_THREAD = 0x7E020000, 0x00010000
_ALLOW, _ERROR, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _FIRST_ARGUMENT_OFFSET = 0, 4, 16


def is_supported() -> bool:
    """Whether the calls of this architecture are known here."""
    return platform.machine() in _ARCHITECTURES


def restrict(*, network: bool) -> None:
    """Refuse sockets (unless `network`), new namespaces, mounts, other processes' memory, and administration.

    The process must have no_new_privs.
    Raises: OSError.
    """
    _install(_ALWAYS if network else ("socket", *_ALWAYS), forbidden_clone_flags=_NAMESPACES)


def forbid_processes() -> None:
    """Refuse new processes and programs; threads are allowed.

    Raises: OSError.
    """
    _install(PROCESS_CALLS, required_clone_flags=_CLONE_THREAD)


def forbid(names: Iterable[str]) -> None:
    """Refuse calls by their names.

    Raises: OSError.
    """
    _install(names)


def _install(names: Iterable[str], forbidden_clone_flags: int = 0, required_clone_flags: int = 0) -> None:
    architecture, column = _ARCHITECTURES[platform.machine()]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_OFFSET),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        (_JUMP_AT_LEAST, 0, 1, _X32_CALLS),
        (_RETURN, 0, 0, _ERROR | errno.EPERM),
    ]
    for name in names:
        if (number := _CALLS[name][column]) is not None:
            program += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERROR | errno.EPERM)]
    if flags := forbidden_clone_flags or required_clone_flags:
        program += _clone_rules(flags, column, refused_if_set=bool(forbidden_clone_flags))
    program.append((_RETURN, 0, 0, _ALLOW))
    _load(program)


def _clone_rules(flags: int, column: int, *, refused_if_set: bool) -> list[tuple[int, int, int, int]]:
    """Check clone's flags. clone3 passes them in memory, so it does not exist; libc then calls clone."""
    clone, clone3 = _CALLS["clone"][column], _CALLS["clone3"][column]
    assert clone is not None
    assert clone3 is not None
    refuse, accept = (_RETURN, 0, 0, _ERROR | errno.EPERM), (_RETURN, 0, 0, _ALLOW)
    return [
        (_JUMP_EQUAL, 0, 1, clone3),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
        (_JUMP_EQUAL, 0, 4, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_OFFSET),
        (_JUMP_ANY_BIT, 0, 1, flags),
        *((refuse, accept) if refused_if_set else (accept, refuse)),
    ]


def _load(program: list[tuple[int, int, int, int]]) -> None:
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    instructions = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(instructions)))
    filter_mode = 2
    syscalls.prctl(syscalls.PR_SET_SECCOMP, filter_mode, header)
