"""Digest of what a data setting leads to: a file, a folder, or the files that a glob pattern matches."""

import hashlib
from pathlib import Path

from megatron_q3n.config import UserError
from megatron_q3n.config.paths import existing


def content_digest(path: str | Path) -> str:
    """Return the SHA-256 of the digests of a file, of every file in a folder, or of every match of a pattern.

    Raises: UserError for a file that cannot be read, or a path or pattern without a file.
    """
    files = sorted(
        file
        for found in existing(str(path))
        for file in (found.rglob("*") if found.is_dir() else [found])
        if file.is_file()
    )
    if not files:
        raise UserError(f"{path}: No such file, or nothing in it. Restore it, or change the setting.")
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}. Restore it, or change the setting.") from None
    return digest.hexdigest()
