"""A folder that is written file by file, continued after an interruption, and visible only when complete.

Everything happens in a hidden folder beside the output: `files/` becomes the output by one rename;
`progress/` has one note per finished file with its size, digest and whatever its writer will want
to know again. A file counts as finished only with its note, and its contents are held against the
note before it is kept.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_q3n.checkpoint import integrity
from megatron_q3n.config import UserError

Note = Callable[[str], None]


class Unfinished:
    """The output in the making.

    task: what is made from what with which options; a leftover of another task is discarded.
    Raises: UserError if the output exists or another process is making it.
    """

    def __init__(self, output: Path, task: dict[str, Any], note: Note) -> None:
        self._output, self._task = output, json.loads(json.dumps(task))
        self._folder = output.with_name(f".{output.name}.partial")
        self._files, self._progress = self._folder / "files", self._folder / "progress"
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise UserError(f"{output} exists; delete it or give another --output.")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self._folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {output}; wait for it or stop it.") from None
        self._finished = self._kept(note)

    def __enter__(self) -> "Unfinished":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    @property
    def folder(self) -> Path:
        """Where files that are made in no time may be written directly."""
        return self._files

    @property
    def digests(self) -> dict[str, str]:
        """The digest of every finished file."""
        return {name: note["digest"] for name, note in self._finished.items()}

    @property
    def num_bytes(self) -> int:
        """Size of all finished files."""
        return sum(note["num_bytes"] for note in self._finished.values())

    def finished(self, name: str) -> dict[str, Any] | None:
        """Return what was noted of a file, or None if it is still to be written."""
        note = self._finished.get(name)
        return note and note["facts"]

    @contextmanager
    def writing(self, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Lend a path to write a file to, and a place for facts to note; finished when the block ends.

        Raises: UserError if the disk takes no more.
        """
        path, facts = self._folder / f"{name}.writing", {}  # type: tuple[Path, dict[str, Any]]
        try:
            yield path, facts
            digest, num_bytes = integrity.settle_on_disk(path), path.stat().st_size
            note = {"digest": digest, "num_bytes": num_bytes, "facts": facts}
            os.replace(path, self._files / name)
            _write_json(self._progress / f"{name}.json", note)
        except (OSError, RuntimeError) as error:
            # torch.save hides the operating system's complaint behind one of its own
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise UserError(
                f"{path} could not be written ({cause.strerror}). Free space, or make the folder "
                "writable; then the same command continues."
            ) from None
        self._finished[name] = note

    def require_space(self, num_bytes: int) -> None:
        """Raise UserError if the disk cannot take what is left of so many bytes."""
        free = shutil.disk_usage(self._folder).free
        left = num_bytes - self.num_bytes
        if free < left:
            raise UserError(
                f"{self._output.parent}: {free / 2**30:.2f} GiB free, {left / 2**30:.2f} GiB needed; "
                "free space or give an --output on another disk."
            )

    def publish(self) -> None:
        """Give the folder its name."""
        os.replace(self._files, self._output)  # an empty folder of that name gives way
        self._lock.close()
        shutil.rmtree(self._folder)

    def _kept(self, note: Note) -> dict[str, dict[str, Any]]:
        """Return the notes of finished files that still are what they were; delete everything else."""
        task = self._progress / "task"
        if not task.is_file() or json.loads(task.read_text()) != self._task:
            if any(self._progress.glob("*.json")):
                note("an unfinished output of another source or other options is discarded")
            shutil.rmtree(self._files, ignore_errors=True)
            shutil.rmtree(self._progress, ignore_errors=True)
            self._progress.mkdir()
            _write_json(task, self._task)
        self._files.mkdir(exist_ok=True)
        for leftover in self._folder.glob("*.writing"):
            leftover.unlink()
        kept = {}
        for path in sorted(self._progress.glob("*.json")):
            noted, file = (json.loads(path.read_text()), self._files / path.name.removesuffix(".json"))
            if (
                file.is_file()
                and file.stat().st_size == noted["num_bytes"]
                and integrity.digest(file) == noted["digest"]
            ):
                kept[file.name] = noted
            else:
                note(f"{file.name} is not what was written; it is made anew")
                path.unlink()
        if kept:
            note(f"continuing: {len(kept)} finished files kept")
        return kept


def plan_digest(files: Iterable[object]) -> str:
    """Return a fingerprint of what goes into which file, in order: a leftover must agree in it."""
    plan = hashlib.sha256()
    for file in files:
        plan.update(repr(file).encode())
    return plan.hexdigest()


def _write_json(path: Path, content: Any) -> None:
    """Write a file that is there in full or not at all."""
    fresh = path.with_name(f".{path.name}.fresh")
    with fresh.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
