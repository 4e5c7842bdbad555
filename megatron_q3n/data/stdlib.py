"""The default corpus: the Python standard library's own source, present wherever this code runs.

Real text with no download. It is split by file, so that validation text was never seen, and tokenised by
a BPE trained on the library's train files alone; both are cached per Python version. Left out are test suites and
what is not prose or code written by people: character tables (`encodings`), rendered documentation
(`pydoc_data`), and files that differ from build to build (`config-*`, `_sysconfigdata_*`).

Two million tokens are soon read. Installed packages may be added: torch and transformers are ten times as much. They
are split by folder, for what lies together is often alike; still, transformers' models are near copies of each other
across folders, so a loss on text held out of it flatters.
"""

import hashlib
import importlib.util
import itertools
import json
import os
import platform
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_q3n.config import UserError
from megatron_q3n.config.data import DataConfig
from megatron_q3n.data.encoding import encode_documents
from megatron_q3n.data.folders import cache_root, publish
from megatron_q3n.data.manifest import Settings, SourceRecord, verify_prepared
from megatron_q3n.data.tokenizer import TextTokenizer, train_bpe

# Raise when the same sources would give other tokens: it is part of the cache key.
_PREPARATION_VERSION = 1
_FILES_AT_ONCE = 64

_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idlelib",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata_")


@dataclass(frozen=True)
class StdlibCorpus:
    """Two prepared folders."""

    train: Path
    validation: Path


@dataclass(frozen=True)
class Source:
    """A file of the corpus: its name in it, and what decides whether it is held out."""

    path: Path
    name: str
    unit: str


def corpus_of(data: DataConfig) -> StdlibCorpus:
    """Prepare the corpus that a configuration describes, or find it in the cache; see `prepare_stdlib`."""
    return prepare_stdlib(
        cache_root(data.cache_dir),
        data.stdlib_vocab_size,
        data.stdlib_validation_percent,
        packages=data.stdlib_packages,
    )


def stdlib_files(root: Path | None = None) -> list[Path]:
    """Return the corpus files below a standard library folder (this Python's own), sorted.

    Raises: UserError if there is no source, as in a zipped or stripped Python.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = _python_files(root)
    if not files:
        raise UserError(
            f"data.source=stdlib: {root} holds no Python source (a zipped or stripped Python?). Use "
            "another Python, or data.source=blend with folders made by tools/prepare_data.py."
        )
    return files


def package_files(package: str) -> list[Source]:
    """Return the source files of an installed package, which is found but not imported.

    Raises: UserError if it is not installed, or is not a folder of Python source.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = [Path(place) for place in (spec and spec.submodule_search_locations) or []]
    found = [
        Source(file, name, name.rpartition("/")[0])
        for folder in folders
        for file in _python_files(folder)
        for name in [f"{package}/{file.relative_to(folder).as_posix()}"]
    ]
    if not found:
        raise UserError(
            f"data.stdlib_packages: {package} is not installed here as a folder of Python source; name packages as "
            "they are imported, e.g. [torch, transformers], or leave it out."
        )
    return found


def _python_files(root: Path) -> list[Path]:
    files = []
    for folder, children, names in os.walk(root):
        children[:] = [
            child for child in children if child not in _SKIPPED_FOLDERS and not child.startswith(_SKIPPED_PREFIXES)
        ]
        files += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIXES)
        ]
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def is_validation(relative: str, percent: float) -> bool:
    """Say whether a file or folder is held out: a stable function of its path below the library's root."""
    digest = hashlib.sha256(relative.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < percent / 100


def prepare_stdlib(
    cache: Path, vocab_size: int, validation_percent: float, root: Path | None = None, packages: Sequence[str] = ()
) -> StdlibCorpus:
    """Prepare the corpus in the cache, or find it there.

    Safe when several processes do it at once: the folder appears when complete, and the first one stays.

    Raises: UserError if the cache cannot be written or is damaged, if no file is held out, or if a package is not
        installed.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    names = [(file, file.relative_to(root).as_posix()) for file in stdlib_files(root)]
    files = [Source(file, name, name) for file, name in names]
    added = [source for package in packages for source in package_files(package)]
    folder = cache / "stdlib" / _key([*files, *added], vocab_size, validation_percent)
    if not folder.is_dir():
        _build(folder, files, added, vocab_size, validation_percent)
    corpus = StdlibCorpus(folder / "train", folder / "validation")
    try:
        verify_prepared(corpus.train)
        verify_prepared(corpus.validation)
    except UserError as error:
        raise UserError(f"{error} (It is a cache: delete {folder} and run again.)") from None
    return corpus


def _key(files: list[Source], vocab_size: int, validation_percent: float) -> str:
    """Name a corpus by all it depends on; the listing tells apart two builds of one Python version."""
    listing = [(file.name, file.path.stat().st_size) for file in files]
    identity = json.dumps([_PREPARATION_VERSION, vocab_size, validation_percent, listing])
    digest = hashlib.sha256(identity.encode("utf-8")).hexdigest()
    return f"python-{platform.python_version()}-{digest[:16]}"


def _build(folder: Path, files: list[Source], added: list[Source], vocab_size: int, validation_percent: float) -> None:
    split = _split(files, validation_percent)
    if not split[True] or not split[False]:
        raise UserError(
            f"data.stdlib_validation_percent={validation_percent} splits {len(files)} files into "
            f"{len(split[False])} for training and {len(split[True])} for validation; choose another share."
        )
    tokenizer = train_bpe(split[False].values(), vocab_size)
    more = _split(added, validation_percent)
    packages = sorted({source.name.partition("/")[0] for source in added})
    read = sum(len(part) for half in (split, more) for part in half.values())
    settings: Settings = {
        "corpus": ", ".join([f"standard library of Python {platform.python_version()}", *packages]),
        "stdlib_vocab_size": vocab_size,
        "stdlib_validation_percent": validation_percent,
        "num_files_not_utf8": len(files) + len(added) - read,
    }
    with publish(folder, setting="data.cache_dir") as temporary:
        for held_out, name in ((False, "train"), (True, "validation")):
            _write(temporary / name, tokenizer, split[held_out] | more[held_out], settings)


def _split(files: list[Source], percent: float) -> dict[bool, dict[Path, str]]:
    """Return the texts of the files for training (False) and of those held out (True)."""
    split: dict[bool, dict[Path, str]] = {False: {}, True: {}}
    for file in files:
        text = _read(file.path)
        if text is not None:
            split[is_validation(file.unit, percent)][file.path] = text
    return split


def _read(file: Path) -> str | None:
    """Return the text with its line ends as they are, or None if it is not UTF-8."""
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def _write(folder: Path, tokenizer: TextTokenizer, texts: dict[Path, str], settings: Settings) -> None:
    # late: five seconds of imports that a warm cache does without
    from megatron_q3n.data.writer import PreparedWriter

    folder.mkdir()
    writer = PreparedWriter(folder, tokenizer)
    for batch in itertools.batched(texts.values(), _FILES_AT_ONCE):
        writer.add(encode_documents(tokenizer, batch))
    sources = [SourceRecord(path=str(file), size_bytes=file.stat().st_size) for file in texts]
    writer.finish(sources, settings)
