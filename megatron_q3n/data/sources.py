"""Input discovery for data preparation: files, globs and folders, resolved to a sorted list of checked sources.

Errors that names and sizes reveal are raised here, before a worker process or a slow import starts. `readers.py` reads
the sources.
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
    size_bytes: int


def find_sources(inputs: Sequence[str], format: Format | None = None) -> list[Source]:
    """Return the sources of files, globs and folders, sorted by path within each input.

    `format` is the format of files whose suffix is unknown, and selects the files of folders.

    Raises: UserError for a path that is missing, given twice, empty, of an unknown format, or of a format whose
        package is not installed.
    """
    sources = [source for argument in inputs for source in _expand(argument, format)]
    unique: set[Path] = set()
    for source in sources:
        _check_packages(source)
        if source.path.resolve() in unique:
            raise UserError(
                f"input {source.path} is given twice. Give it once; to weight data sets, prepare them "
                "separately and blend them with data.train weights."
            )
        unique.add(source.path.resolve())
    if not sum(source.size_bytes for source in sources):
        raise UserError(f"input {', '.join(inputs)}: only empty files. Check the paths.")
    return sources


def left_out_files(inputs: Sequence[str], format: Format | None = None) -> list[Path]:
    """Return the files in folders of the input that are left out, because their suffix names no (or another) format."""
    folders = [path for argument in inputs if (path := Path(argument).expanduser()).is_dir()]
    chosen = {source.path for source in find_sources([str(folder) for folder in folders], format)} if folders else set()
    if any(path.is_dir() for path in chosen):
        # a saved dataset is read as a whole
        folders = [folder for folder in folders if folder.absolute() not in chosen]
    files = (file for folder in folders for file in sorted(folder.rglob("*")) if not _is_hidden(file, folder))
    return [file for file in files if file.is_file() and file.absolute() not in chosen]


def find_row_sources(argument: str) -> list[Source]:
    """Return the sources of rows (conversations, prompts) of a file, folder or glob pattern.

    As `find_sources`, but a file whose suffix names no format of rows is JSONL, and text files in folders are left out.

    Raises: UserError as there.
    """
    path = Path(argument).expanduser()
    if path.is_file():
        suffix_format = _parse_suffix(path)[0]
        return find_sources([argument], "jsonl" if suffix_format in (None, "text") else None)
    return [source for source in find_sources([argument]) if source.format != "text"]


def _check_packages(source: Source) -> None:
    for package in _PACKAGES.get(source.format, ()):
        spec = importlib.util.find_spec(package)
        # a folder of that name in the working directory is a namespace package, without an origin
        if spec is None or spec.origin is None:
            raise UserError(
                f"input {source.path}: reading {source.format} needs {package}, which is not installed. "
                f"pip install {package}, or give the texts as JSONL or text files."
            )


def _expand(argument: str, format: Format | None) -> Iterable[Source]:
    path = Path(argument).expanduser()
    if path.is_dir():
        return _folder_sources(path, format)
    if path.exists():
        return [_file_source(path, format)]
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not matches:
        raise UserError(f"input {argument}: no such file or folder, and as a glob pattern it matches nothing.")
    return [source for match in matches for source in _expand(str(match), format)]


def _folder_sources(folder: Path, format: Format | None) -> list[Source]:
    """Return a saved dataset as one source, else every file below the folder with a known suffix (and format)."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in folder.iterdir() if child.is_dir())
        raise UserError(
            f"input {folder}: a Hugging Face DatasetDict with the splits {', '.join(splits)}. "
            f"Give one of them, e.g. {folder / (splits or ['train'])[0]}."
        )
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        size = sum(file.stat().st_size for file in folder.glob("*.arrow"))
        return [Source(folder.absolute(), "dataset", None, size)]
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not _is_hidden(file, folder))
    chosen = [file for file in files if _parse_suffix(file)[0] and format in (None, _parse_suffix(file)[0])]
    if not chosen:
        raise UserError(
            f"input {folder}: none of its {len(files)} files is {format or 'of a known format'} "
            f"({', '.join(_FORMAT_OF_SUFFIX)}, each also .gz or .zst). Name files with a glob and --format."
        )
    return [_file_source(file, None) for file in chosen]


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _parse_suffix(path: Path) -> tuple[Format | None, Compression | None]:
    """Return format and compression according to a file's suffixes."""
    compression = _COMPRESSION_OF_SUFFIX.get(path.suffix.lower())
    stem = path.with_suffix("") if compression else path
    return _FORMAT_OF_SUFFIX.get(stem.suffix.lower()), compression


def _file_source(path: Path, format: Format | None) -> Source:
    suffix_format, compression = _parse_suffix(path)
    format = format or suffix_format
    if format is None:
        raise UserError(
            f"input {path}: its name does not tell the format. Known suffixes are {', '.join(_FORMAT_OF_SUFFIX)} "
            "(each also .gz or .zst); for other names give --format text, jsonl or parquet."
        )
    if format == "parquet" and compression:
        raise UserError(f"input {path}: unpack it first; parquet files are compressed internally.")
    if format == "dataset":
        raise UserError(f"input {path}: --format dataset needs a folder written by save_to_disk.")
    try:
        with path.open("rb"):
            return Source(path.absolute(), format, compression, path.stat().st_size)
    except OSError as error:
        raise UserError(f"input {path}: cannot be read ({error.strerror}). Check the path and permissions.") from None
