"""Default corpus: the source code of the Python standard library, which needs no download.

The split is by file, so that validation files are not in the training data. The tokenizer is a BPE trained on the
library's training files alone; both are cached per Python version. Excluded are test suites and generated files:
character tables (`encodings`), rendered documentation (`pydoc_data`), and build-dependent files (`config-*`,
`_sysconfigdata_*`).

The library has about two million tokens. Installed packages may be added: torch and transformers have ten times as
many. They are split by folder, since files of one folder are often similar. transformers' models are near copies of
each other across folders as well, so a validation loss on transformers is too low.
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
from megatron_q3n.data.writer import PreparedWriter

# part of the cache key: raise it when the same sources would give other tokens
_PREPARATION_VERSION = 1
_FILES_PER_BATCH = 64

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
    """The prepared folders of training and validation."""

    train: Path
    validation: Path


@dataclass(frozen=True)
class Source:
    """A file of the corpus, its name in the corpus, and the path (`unit`) whose hash decides the split."""

    path: Path
    name: str
    unit: str


def load_stdlib_corpus(data: DataConfig) -> StdlibCorpus:
    """Return the corpus of a configuration, prepared first if the cache has none; see `prepare_stdlib`."""
    return prepare_stdlib(
        cache_root(data.cache_dir),
        data.stdlib_vocab_size,
        data.stdlib_validation_percent,
        packages=data.stdlib_packages,
    )


def stdlib_files(root: Path | None = None) -> list[Path]:
    """Return the corpus files below a standard library folder (default: of this Python), sorted.

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
    """Return the source files of an installed package, without importing it.

    Raises: UserError if it is not installed, or is not a folder of Python source.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = [Path(location) for location in (spec and spec.submodule_search_locations) or []]
    sources = [
        Source(file, name, name.rpartition("/")[0])
        for folder in folders
        for file in _python_files(folder)
        for name in [f"{package}/{file.relative_to(folder).as_posix()}"]
    ]
    if not sources:
        raise UserError(
            f"data.stdlib_packages: {package} is not installed here as a folder of Python source; name packages as "
            "they are imported, e.g. [torch, transformers], or leave it out."
        )
    return sources


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
    """Return whether a file or folder is held out, by a hash of its path below the library's root."""
    digest = hashlib.sha256(relative.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < percent / 100


def prepare_stdlib(
    cache: Path, vocab_size: int, validation_percent: float, root: Path | None = None, packages: Sequence[str] = ()
) -> StdlibCorpus:
    """Return the corpus from the cache, prepared first if it is absent.

    Safe for several processes at once: the folder is renamed into place when complete, and the first one is kept.

    Raises: UserError if the cache cannot be written or is damaged, if no file is held out, or if a package is not
        installed.
    """
    files, added = _corpus_sources(root, packages)
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


def corpus_key(data: DataConfig) -> str:
    """Return the name of a configuration's corpus, which differs where its files do; nothing is prepared."""
    files, added = _corpus_sources(None, data.stdlib_packages)
    return _key([*files, *added], data.stdlib_vocab_size, data.stdlib_validation_percent)


def _corpus_sources(root: Path | None, packages: Sequence[str]) -> tuple[list[Source], list[Source]]:
    """Return the files of the standard library, and those of the added packages."""
    root = root or Path(sysconfig.get_path("stdlib"))
    names = [(file, file.relative_to(root).as_posix()) for file in stdlib_files(root)]
    added = [source for package in packages for source in package_files(package)]
    return [Source(file, name, name) for file, name in names], added


def _key(files: list[Source], vocab_size: int, validation_percent: float) -> str:
    """Return the cache key of a corpus; the file listing distinguishes two builds of one Python version."""
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
    added_split = _split(added, validation_percent)
    packages = sorted({source.name.partition("/")[0] for source in added})
    num_decoded = sum(len(texts) for halves in (split, added_split) for texts in halves.values())
    settings: Settings = {
        "corpus": ", ".join([f"standard library of Python {platform.python_version()}", *packages]),
        "stdlib_vocab_size": vocab_size,
        "stdlib_validation_percent": validation_percent,
        "num_files_not_utf8": len(files) + len(added) - num_decoded,
    }
    with publish(folder, setting="data.cache_dir") as temporary:
        for held_out, name in ((False, "train"), (True, "validation")):
            _write(temporary / name, tokenizer, split[held_out] | added_split[held_out], settings)


def _split(files: list[Source], percent: float) -> dict[bool, dict[Path, str]]:
    """Return the texts of the training files (False) and of the held-out files (True)."""
    split: dict[bool, dict[Path, str]] = {False: {}, True: {}}
    for file in files:
        text = _read(file.path)
        if text is not None:
            split[is_validation(file.unit, percent)][file.path] = text
    return split


def _read(file: Path) -> str | None:
    """Return the text with unchanged line ends, or None if it is not UTF-8."""
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def _write(folder: Path, tokenizer: TextTokenizer, texts: dict[Path, str], settings: Settings) -> None:
    folder.mkdir()
    writer = PreparedWriter(folder, tokenizer)
    for batch in itertools.batched(texts.values(), _FILES_PER_BATCH):
        writer.add(encode_documents(tokenizer, batch))
    sources = [SourceRecord(path=str(file), size_bytes=file.stat().st_size) for file in texts]
    writer.finish(sources, settings)
