"""Resumable output folder: written file by file, continued after an interruption, complete or absent.

Everything is written to a hidden folder next to the output: `files/` becomes the output by one atomic rename;
`progress/` has one record per finished file with its size, SHA-256 and facts of the writer. A file counts as finished
only with its record, and on resume its contents are verified against the record.
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


class ResumableOutput:
    """Output folder of a conversion that can be interrupted and resumed.

    task: identity of the conversion (source and options); a partial output of another task is deleted.
    Raises: UserError if the output exists or another process is writing it.
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
        self._finished = self._resume(note)

    def __enter__(self) -> "ResumableOutput":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    @property
    def folder(self) -> Path:
        """The folder of the output's files; small files may be written to it directly."""
        return self._files

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every finished file, by name."""
        return {name: note["digest"] for name, note in self._finished.items()}

    @property
    def num_bytes(self) -> int:
        """Total size of all finished files."""
        return sum(note["num_bytes"] for note in self._finished.values())

    def finished(self, name: str) -> dict[str, Any] | None:
        """Return the facts recorded for a finished file, or None if it must still be written."""
        note = self._finished.get(name)
        return note and note["facts"]

    @contextmanager
    def writing(self, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield a path to write a file to, and a dict of facts to record; the file is finished when the block ends.

        Raises: UserError if the disk is full or not writable.
        """
        path, facts = self._folder / f"{name}.writing", {}  # type: tuple[Path, dict[str, Any]]
        try:
            yield path, facts
            digest, num_bytes = integrity.fsync_and_digest(path), path.stat().st_size
            note = {"digest": digest, "num_bytes": num_bytes, "facts": facts}
            os.replace(path, self._files / name)
            _write_json(self._progress / f"{name}.json", note)
        except (OSError, RuntimeError) as error:
            # torch.save raises a RuntimeError in place of the OSError
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise UserError(
                f"{path} could not be written ({cause.strerror}). Free space, or make the folder "
                "writable; then repeat the command, which resumes."
            ) from None
        self._finished[name] = note

    def require_space(self, num_bytes: int) -> None:
        """Raise UserError if the remaining bytes of an output of `num_bytes` exceed the free disk space."""
        free = shutil.disk_usage(self._folder).free
        remaining = num_bytes - self.num_bytes
        if free < remaining:
            raise UserError(
                f"{self._output.parent}: {free / 2**30:.2f} GiB free, {remaining / 2**30:.2f} GiB needed; "
                "free space or give an --output on another disk."
            )

    def publish(self) -> None:
        """Rename the complete folder to the output's name."""
        # os.replace also replaces an empty folder of that name
        os.replace(self._files, self._output)
        self._lock.close()
        shutil.rmtree(self._folder)

    def _resume(self, note: Note) -> dict[str, dict[str, Any]]:
        """Return the records of finished files whose contents match their digest; delete everything else."""
        task = self._progress / "task"
        if not task.is_file() or json.loads(task.read_text()) != self._task:
            if any(self._progress.glob("*.json")):
                note("discarding the partial output of another source or other options")
            shutil.rmtree(self._files, ignore_errors=True)
            shutil.rmtree(self._progress, ignore_errors=True)
            self._progress.mkdir()
            _write_json(task, self._task)
        self._files.mkdir(exist_ok=True)
        for leftover in self._folder.glob("*.writing"):
            leftover.unlink()
        finished = {}
        for path in sorted(self._progress.glob("*.json")):
            record, file = (json.loads(path.read_text()), self._files / path.name.removesuffix(".json"))
            if (
                file.is_file()
                and file.stat().st_size == record["num_bytes"]
                and integrity.file_digest(file) == record["digest"]
            ):
                finished[file.name] = record
            else:
                note(f"{file.name} does not match its digest; it is written again")
                path.unlink()
        if finished:
            note(f"continuing: {len(finished)} finished files kept")
        return finished


def plan_digest(files: Iterable[object]) -> str:
    """Return a SHA-256 of the contents planned for each file, in order; a partial output must have the same plan."""
    plan = hashlib.sha256()
    for file in files:
        plan.update(repr(file).encode())
    return plan.hexdigest()


def _write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically: to a temporary file, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.fresh")
    with temporary.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
