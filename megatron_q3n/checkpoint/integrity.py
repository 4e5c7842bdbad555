"""Integrity of a checkpoint: a manifest with the SHA-256 checksum of every file, and a checksum of the manifest itself.

The manifest `checkpoint.json` lists every file with its size and SHA-256, and ends with the SHA-256 of its own text
(the field `seal`), so a change of any byte of a checkpoint is detected. SHA-256, because processors compute it in
hardware (0.7 GB/s per core on a busy EPYC; BLAKE2b reaches 0.26) and it needs no package. No torch and no megatron-core
here: tools and the Hugging Face converter read and write checkpoints without them.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from megatron_q3n.config import UserError

MANIFEST = "checkpoint.json"
# format 1 had no checksums; it is still read
FORMAT = 2
ALGORITHM = "sha256"
# megatron-core loads this file of its older format in preference to .metadata, if it exists
LEGACY_COMMON_FILE = "common.pt"
Verify = Literal["full", "sizes"]
# end of the manifest's text: the field that holds the checksum of everything before it
_CHECKSUM_FIELD = ',\n "seal": "'
_END = '"\n}\n'
_REQUIRED = {"format": int, "step": int, "world_size": int, "model": dict, "files": dict}
_OPTIONAL: dict[str, Any] = {
    "tokens": int,
    "skipped_steps": int,
    "saved_at": int | float,
    "layout": dict,
    "precision": dict,
    "digests": dict,
    "digest_algorithm": str,
}


class UnreadableFileError(UserError):
    """A file that could not be read, which does not mean that it is damaged."""


def has_manifest(checkpoint: Path) -> bool:
    """Return whether a folder has a manifest, which is written last.

    Raises: UnreadableFileError if the folder may not be searched.
    """
    try:
        return (checkpoint / MANIFEST).is_file()
    except OSError as error:
        raise _unreadable(checkpoint / MANIFEST, error) from None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's contents, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, ALGORITHM).hexdigest()


def fsync_and_digest(path: Path) -> str:
    """Sync a file to disk and return its SHA-256.

    megatron-core syncs before the last buffer is flushed, and does not sync its two metadata files.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_digest(path)


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Sync each named file and return its SHA-256; several at a time."""
    names = list(names)
    with ThreadPoolExecutor(_num_threads()) as pool:
        return dict(zip(names, pool.map(lambda name: fsync_and_digest(folder / name), names)))


def write_manifest(
    folder: Path, fields: Mapping[str, Any] | None = None, known: Mapping[str, str] | None = None
) -> None:
    """Write checkpoint.json into a finished folder: `fields`, size and SHA-256 of each file, and its own checksum.

    Without `fields`, those of the folder's existing checkpoint.json are used. `known` holds digests that need not be
    computed again. The file is written atomically and synced.

    Raises: UserError without `fields` and checkpoint.json; OSError if it cannot be written.
    """
    if fields is None:
        fields = read_manifest(folder)
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    known = known or {}
    all_digests = {**known, **digests(folder, [name for name in files if name not in known])}
    content = {
        **{name: value for name, value in fields.items() if name != "seal"},
        "format": FORMAT,
        "files": files,
        "digest_algorithm": ALGORITHM,
        "digests": {name: all_digests[name] for name in files},
    }
    body = json.dumps(content, indent=1).removesuffix("\n}")
    partial = folder / f".{MANIFEST}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(_with_checksum(body))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / MANIFEST)
    sync_folder(folder)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest, after checking its own checksum.

    Raises: UserError naming the file if it is missing, damaged or of a newer format; UnreadableFileError.
    """
    path = checkpoint / MANIFEST
    if not has_manifest(checkpoint):
        raise UserError(f"{checkpoint} is not a complete checkpoint: it has no {MANIFEST}.")
    try:
        text = path.read_bytes().decode("utf-8")
        manifest = json.loads(text)
        problem = _manifest_problem(text, manifest)
    except (ValueError, RecursionError) as error:
        problem = str(error)
    except OSError as error:
        if error.errno != errno.EIO:
            raise _unreadable(path, error) from None
        problem = str(error)
    if problem:
        raise UserError(f"{path} is damaged ({problem}); use another checkpoint.")
    if manifest["format"] > FORMAT:
        raise UserError(
            f"{path} is of format {manifest['format']}, this version reads up to {FORMAT}: update megatron_q3n."
        )
    return manifest


def has_digests(manifest: Mapping[str, Any]) -> bool:
    """Return whether the manifest holds checksums; those of format 1 and of other writers may not."""
    return "digests" in manifest


def find_damage(checkpoint: Path, verify: Verify, rank: int = 0, world_size: int = 1) -> list[str]:
    """Return the problems of a checkpoint, one line per file; an empty list means that it is intact.

    `rank` of `world_size` processes verifies its share of the files, so that together they read each file once.
    Raises: UnreadableFileError if a file may not be read, or its disk does not answer.
    """
    try:
        manifest = read_manifest(checkpoint)
    except UnreadableFileError:
        raise
    except UserError as error:
        return [str(error)]
    problems = _folder_problems(checkpoint, manifest)
    sizes, expected = manifest["files"], manifest.get("digests", {})
    share = sorted(sizes, key=lambda name: (-sizes[name], name))[rank::world_size]
    is_full = verify == "full"
    with ThreadPoolExecutor(_num_threads()) as pool:
        file_problems = pool.map(
            lambda name: file_problem(checkpoint / name, sizes[name], expected.get(name) if is_full else None), share
        )
        return problems + [problem for problem in file_problems if problem]


def file_problem(path: Path, size: int, digest: str | None) -> str | None:
    """Return the problem of one file, or None; without a digest only the size is compared."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return f"{path} is not a file"
        actual_size = status.st_size
        if actual_size != size:
            return f"{path} has {actual_size} bytes instead of {size}"
        if digest and file_digest(path) != digest:
            return f"{path} does not match its digest: its contents have changed since it was saved"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        # EIO: a lost sector. Anything else (permissions, a disk that is not mounted) says nothing about the contents
        if error.errno != errno.EIO:
            raise _unreadable(path, error) from None
        return f"{path} cannot be read ({error.strerror})"
    return None


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries, not its files' contents, to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unreadable(path: Path, error: OSError) -> UnreadableFileError:
    return UnreadableFileError(
        f"{path} cannot be read ({error.strerror}). The checkpoint is not known to be damaged and was not changed; "
        "correct the permissions or the mount, then start again."
    )


def _with_checksum(body: str) -> str:
    return f"{body}{_CHECKSUM_FIELD}{hashlib.new(ALGORITHM, body.encode()).hexdigest()}{_END}"


def _manifest_problem(text: str, manifest: Any) -> str | None:
    """Return the problem of a manifest, or None: its own checksum, and the fields that every reader needs."""
    if not isinstance(manifest, dict):
        return "not an object"
    # a damaged format number or key must not make a manifest with checksum pass as one of format 1
    if manifest.get("format") != 1 or {"seal", "digests"} & manifest.keys():
        body, separator, _ = text.rpartition(_CHECKSUM_FIELD)
        if not separator or text != _with_checksum(body):
            return "it does not match its own checksum"
        files, all_digests = manifest.get("files"), manifest.get("digests")
        if not isinstance(files, dict) or not isinstance(all_digests, dict) or files.keys() != all_digests.keys():
            return "files without checksums"
    for name, kind in _REQUIRED.items():
        if not isinstance(manifest.get(name), kind):
            return f"no field {name!r}"
    for name, kind in _OPTIONAL.items():
        if name in manifest and not isinstance(manifest[name], kind):
            return f"field {name!r} is of another type"
    return _file_list_problem(manifest["files"], manifest.get("digests", {}))


def _file_list_problem(files: Mapping[str, Any], all_digests: Mapping[str, Any]) -> str | None:
    """Return the problem of a foreign list of files, or None: a path may lead out of the checkpoint."""
    for name, size in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            return f"{name!r:.80} is no file of a checkpoint"
        if not isinstance(size, int) or size < 0:
            return f"the size of {name!r:.80} is no size"
    return None if all(isinstance(digest, str) for digest in all_digests.values()) else "a digest is no text"


def _folder_problems(checkpoint: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return problems that no checksum detects: another step's contents, or a file that megatron-core prefers."""
    problems = []
    name = checkpoint.name.removeprefix("step_")
    if name != checkpoint.name and name.isdigit() and int(name) != manifest["step"]:
        problems.append(f"{checkpoint} holds step {manifest['step']}")
    if LEGACY_COMMON_FILE not in manifest["files"] and (checkpoint / LEGACY_COMMON_FILE).exists():
        problems.append(f"{checkpoint / LEGACY_COMMON_FILE} was not saved with this checkpoint; remove it")
    return problems


def _num_threads() -> int:
    return max(1, min(8, len(os.sched_getaffinity(0))))
