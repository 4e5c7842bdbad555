"""Code run without root's right to read everything, so that file permissions apply in a test."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

UNPRIVILEGED_USER = 65534


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Let this process act as a user without privileges; nothing to do if it has none."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(UNPRIVILEGED_USER)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def public_folder() -> Iterator[Path]:
    """Return a folder that every user can enter and read, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
