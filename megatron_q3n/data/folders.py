"""Atomic creation of output folders (complete or absent), and the cache folder.

A prepared corpus or an index is written into a hidden folder next to its final path and renamed when it is complete.
A killed process leaves a hidden folder behind, never a partial corpus. Two processes that prepare the same folder at
once both succeed, and one of the equal results is kept.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_q3n.config import UserError

_NOT_WRITABLE = {errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS}


def cache_root(cache_dir: str | None) -> Path:
    """Return the folder for cached corpora and indices: `cache_dir`, $Q3N_CACHE or ~/.cache/megatron_q3n."""
    chosen = cache_dir or os.environ.get("Q3N_CACHE") or "~/.cache/megatron_q3n"
    return Path(chosen).expanduser().absolute()


@contextmanager
def publish(final: Path, *, setting: str, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder; rename it to `final` when the block ends without an error.

    If `final` exists by then, it is kept and the new folder is deleted, unless `replace`.

    Raises: UserError naming `setting` when the disk is full, read-only, or not writable by this user.
    """
    temporary = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        # mkdtemp makes the folder private; a corpus may be shared
        temporary.chmod(0o755)
        yield temporary
        _rename(temporary, final, replace)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise UserError(
            f"{final}: cannot be written ({error.strerror}: {error.filename or final.parent}). Free space, change "
            f"the permissions, or set another path with {setting}."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, final: Path, replace: bool) -> None:
    if replace and final.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent))
        final.rename(old / final.name)
        temporary.rename(final)
        shutil.rmtree(old)
        return
    try:
        temporary.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
