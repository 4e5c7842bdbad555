"""Freed tensors go back to the operating system, or memory is bounded by the model after all.

glibc serves large blocks by mapping memory, until it has seen some freed: then it takes them from
its heap instead. torch asks for aligned blocks, which rarely fit the hole that the last one left, so
the heap grows with every tensor: 9.4 GiB after exporting 10 GiB of them, 1.5 GiB with the threshold fixed.
"""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # malloc.h
THRESHOLD_BYTES = 2**18


def return_freed_memory() -> None:
    """Let this process map every block above 256 KiB, and so return it when it is freed."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        libc.mallopt(_M_MMAP_THRESHOLD, THRESHOLD_BYTES)
