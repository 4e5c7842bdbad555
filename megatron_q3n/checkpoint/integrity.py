"""What proves a checkpoint whole: a SHA-256 digest per file, and a seal over the description that lists them.

`checkpoint.json` names every file with its size and digest, and ends with the digest of its own
text, so there is no byte in a checkpoint whose change goes unseen. SHA-256, because processors
compute it in hardware (0.7 GB/s a core on a busy EPYC, where BLAKE2b makes 0.26) and it needs no
package. No torch and no megatron-core here: tools and the Hugging Face converter read and seal
checkpoints without them.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from megatron_q3n.config import UserError

DESCRIPTION = "checkpoint.json"
FORMAT = 2  # 1 had neither digests nor a seal; it is still read
ALGORITHM = "sha256"
# megatron-core prefers this file of its older format to what .metadata says, if it is there
SHADOWING = "common.pt"
Verify = Literal["full", "sizes"]
_SEAL = ',\n "seal": "'
_END = '"\n}\n'
_REQUIRED = {"format": int, "step": int, "world_size": int, "model": dict, "files": dict}


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's contents, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, ALGORITHM).hexdigest()


def settle_on_disk(path: Path) -> str:
    """Return a file's digest once it is on the disk itself, not only in the machine's memory.

    megatron-core syncs before the last buffer is flushed, and its two metadata files not at all.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return digest(path)


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the digest of each named file, after syncing it; several at a time."""
    names = list(names)
    with ThreadPoolExecutor(_threads()) as pool:
        return dict(zip(names, pool.map(lambda name: settle_on_disk(folder / name), names)))


def seal(folder: Path, description: Mapping[str, Any] | None = None, known: Mapping[str, str] | None = None) -> None:
    """Write checkpoint.json over a finished folder: the description, each file's size and digest, and the seal.

    Without `description`, the folder's present checkpoint.json is sealed. `known` holds digests that
    need not be computed again. The file appears in one step, synced.

    Raises: UserError if there is nothing to describe the folder with; OSError if it cannot be written.
    """
    if description is None:
        description = read(folder)
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != DESCRIPTION
    }
    known = known or {}
    found = {**known, **digests(folder, [name for name in files if name not in known])}
    content = {
        **{name: value for name, value in description.items() if name != "seal"},
        "format": FORMAT,
        "files": files,
        "digest_algorithm": ALGORITHM,
        "digests": {name: found[name] for name in files},
    }
    body = json.dumps(content, indent=1).removesuffix("\n}")
    partial = folder / f".{DESCRIPTION}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(_sealed(body))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / DESCRIPTION)
    sync_folder(folder)


def read(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's description, its seal checked.

    Raises: UserError naming the file if it is missing, damaged or of a newer format.
    """
    path = checkpoint / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{checkpoint} is not a complete checkpoint: it has no {DESCRIPTION}.")
    try:
        text = path.read_bytes().decode("utf-8")
        description = json.loads(text)
        problem = _description_problem(text, description)
    except (ValueError, OSError) as error:
        problem = str(error)
    if problem:
        raise UserError(f"{path} is damaged ({problem}); use another checkpoint.")
    if description["format"] > FORMAT:
        raise UserError(
            f"{path} is of format {description['format']}, this version reads up to {FORMAT}: update megatron_q3n."
        )
    return description


def is_sealed(description: Mapping[str, Any]) -> bool:
    """Say whether the description holds digests; those of format 1 and of other writers may not."""
    return "digests" in description


def damage(checkpoint: Path, verify: Verify, rank: int = 0, world_size: int = 1) -> list[str]:
    """Return what is wrong with a checkpoint, one line per file; an empty list means nothing was found.

    `rank` of `world_size` processes looks at its share of the files, so that together they read each once.
    """
    try:
        description = read(checkpoint)
    except UserError as error:
        return [str(error)]
    problems = _placement_problems(checkpoint, description)
    sizes, wanted = description["files"], description.get("digests", {})
    share = sorted(sizes, key=lambda name: (-sizes[name], name))[rank::world_size]
    full = verify == "full"
    with ThreadPoolExecutor(_threads()) as pool:
        found = pool.map(
            lambda name: file_problem(checkpoint / name, sizes[name], wanted.get(name) if full else None), share
        )
        return problems + [problem for problem in found if problem]


def file_problem(path: Path, size: int, wanted: str | None) -> str | None:
    """Say what is wrong with one file; with no digest wanted, only its size is looked at."""
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path} has {found} bytes instead of {size}"
        if wanted and digest(path) != wanted:
            return f"{path} does not match its digest: its contents have changed since it was saved"
    except FileNotFoundError:
        return f"{path} is missing"
    except PermissionError:
        raise UserError(f"{path} may not be read; permit it to resume from it.") from None
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None


def sync_folder(folder: Path) -> None:
    """Put a folder's entries, not its files' contents, on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sealed(body: str) -> str:
    return f"{body}{_SEAL}{hashlib.new(ALGORITHM, body.encode()).hexdigest()}{_END}"


def _description_problem(text: str, description: Any) -> str | None:
    """Hold a description against its own seal and against what every reader relies on."""
    if not isinstance(description, dict):
        return "not an object"
    # a damaged format number or key must not turn a sealed description into one that never had a seal
    if description.get("format") != 1 or {"seal", "digests"} & description.keys():
        body, found, _ = text.rpartition(_SEAL)
        if not found or text != _sealed(body):
            return "it does not match its own seal"
        if description.get("files", {}).keys() != description.get("digests", {}).keys():
            return "files without digests"
    for name, kind in _REQUIRED.items():
        if not isinstance(description.get(name), kind):
            return f"no {name}"
    return None


def _placement_problems(checkpoint: Path, description: Mapping[str, Any]) -> list[str]:
    """Find what no digest shows: another step's contents, or a file that would be read in place of another."""
    problems = []
    name = checkpoint.name.removeprefix("step_")
    if name != checkpoint.name and name.isdigit() and int(name) != description["step"]:
        problems.append(f"{checkpoint} holds step {description['step']}")
    if SHADOWING not in description["files"] and (checkpoint / SHADOWING).exists():
        problems.append(f"{checkpoint / SHADOWING} was not saved with this checkpoint; remove it")
    return problems


def _threads() -> int:
    return max(1, min(8, len(os.sched_getaffinity(0))))
