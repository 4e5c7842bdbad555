"""Finding the input of a preparation: files, globs and folders become a sorted list of checked sources.

Everything that can be refused from names, sizes and the first bytes is refused here, before any worker
or heavy import starts. Reading the sources is `readers`' part.
"""

import glob
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_q3n.config import UserError

Format = Literal["text", "jsonl", "parquet", "dataset"]
FORMATS: tuple[Format, ...] = ("text", "jsonl", "parquet", "dataset")
Compression = Literal["gz", "zst"]

_FORMAT_OF_SUFFIX: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_PACKAGES: dict[Format, tuple[str, ...]] = {"parquet": ("pyarrow",), "dataset": ("datasets", "pyarrow")}
_COMPRESSION_OF_SUFFIX: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}


@dataclass(frozen=True)
class Source:
    """One input: a file, or a folder that Hugging Face datasets' save_to_disk wrote."""

    path: Path
    format: Format
    compression: Compression | None
    size_bytes: int  # on disk


def find_sources(inputs: Sequence[str], wanted: Format | None = None) -> list[Source]:
    """Return the sources that files, globs and folders name, sorted by path within each input.

    `wanted` says how to read files whose name does not tell, and limits folders to such files.

    Raises: UserError for a path that is missing, given twice, empty, of no known format, or of one whose
        package is not installed.
    """
    sources = [source for given in inputs for source in _expand(given, wanted)]
    seen: set[Path] = set()
    for source in sources:
        _check_packages(source)
        if source.path.resolve() in seen:
            raise UserError(
                f"input {source.path} is given twice. Give it once; to weigh data sets, prepare them "
                "apart and blend them with data.train weights."
            )
        seen.add(source.path.resolve())
    if not sum(source.size_bytes for source in sources):
        raise UserError(f"input {', '.join(inputs)}: only empty files.")
    return sources


def _check_packages(source: Source) -> None:
    for package in _PACKAGES.get(source.format, ()):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a folder of that name here has no origin
            raise UserError(
                f"input {source.path}: reading {source.format} needs {package}, which is not installed. "
                f"pip install {package}, or give the texts as JSONL or text files."
            )


def _expand(given: str, wanted: Format | None) -> Iterable[Source]:
    path = Path(given).expanduser()
    if path.is_dir():
        return _in_folder(path, wanted)
    if path.exists():
        return [_source(path, wanted)]
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not matches:
        raise UserError(f"input {given}: no such file or folder, and as a pattern it matches nothing.")
    return [source for match in matches for source in _expand(str(match), wanted)]


def _in_folder(folder: Path, wanted: Format | None) -> list[Source]:
    """Return a saved dataset as itself, else every file below with a known name (and the wanted format)."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in folder.iterdir() if child.is_dir())
        raise UserError(
            f"input {folder}: a Hugging Face DatasetDict with the splits {', '.join(splits)}. "
            f"Give one of them, e.g. {folder / (splits or ['train'])[0]}."
        )
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        size = sum(file.stat().st_size for file in folder.glob("*.arrow"))
        return [Source(folder.absolute(), "dataset", None, size)]
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not _hidden(file, folder))
    chosen = [file for file in files if _kind(file)[0] and wanted in (None, _kind(file)[0])]
    if not chosen:
        raise UserError(
            f"input {folder}: none of its {len(files)} files is {wanted or 'of a known format'} "
            f"({', '.join(_FORMAT_OF_SUFFIX)}, each also .gz or .zst). Name files with a glob and --format."
        )
    return [_source(file, None) for file in chosen]


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _kind(path: Path) -> tuple[Format | None, Compression | None]:
    """Read format and compression off a file's name."""
    compression = _COMPRESSION_OF_SUFFIX.get(path.suffix.lower())
    stem = path.with_suffix("") if compression else path
    return _FORMAT_OF_SUFFIX.get(stem.suffix.lower()), compression


def _source(path: Path, wanted: Format | None) -> Source:
    named, compression = _kind(path)
    chosen = wanted or named
    if chosen is None:
        raise UserError(
            f"input {path}: its name does not tell the format. Known are {', '.join(_FORMAT_OF_SUFFIX)} "
            "(each also .gz or .zst); else say --format text, jsonl or parquet."
        )
    if chosen == "parquet" and compression:
        raise UserError(f"input {path}: unpack it first; parquet compresses by itself.")
    if chosen == "dataset":
        raise UserError(f"input {path}: --format dataset takes a folder that save_to_disk wrote.")
    try:
        with path.open("rb"):
            return Source(path.absolute(), chosen, compression, path.stat().st_size)
    except OSError as error:
        raise UserError(f"input {path}: cannot be read ({error.strerror}).") from None
