"""Tokenizer of a checkpoint: the one that its run trained with, found through the run directory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_q3n.checkpoint.folders import FOLDER, find
from megatron_q3n.config import UserError
from megatron_q3n.config.data import DataConfig
from megatron_q3n.conversion.importing import KEPT
from megatron_q3n.data.manifest import verify_prepared
from megatron_q3n.data.stdlib import load_stdlib_corpus
from megatron_q3n.data.tokenizer import TOKENIZER_FILE
from megatron_q3n.run_directory import CONFIG, TOKENIZER_FOLDER


@dataclass(frozen=True)
class TokenizerSource:
    """A folder with tokenizer.json, or that file, and what the run knows about it.

    eod_token: name of the end-of-document token; None: found in the folder. is_chat_format: a fine-tuning run wrote the
    folder, so the model was trained with its chat template.
    """

    path: Path
    eod_token: str | None = None
    is_chat_format: bool = False


def run_tokenizer(checkpoint: Path) -> TokenizerSource | None:
    """Return the tokenizer that a checkpoint's model was trained with; None for a checkpoint without a run directory.

    Raises: UserError if the run's training data, which has it, cannot be found.
    """
    if (checkpoint / KEPT / TOKENIZER_FILE).is_file():
        return TokenizerSource(checkpoint / KEPT)
    run_dir = checkpoint.parent.parent
    if checkpoint.parent.name == FOLDER and (run_dir / TOKENIZER_FOLDER / TOKENIZER_FILE).is_file():
        return TokenizerSource(run_dir / TOKENIZER_FOLDER, is_chat_format=True)
    config = _run_config(checkpoint)
    if config is None:
        return None
    data = config["data"]
    if data["tokenizer"] is not None:
        return TokenizerSource(Path(data["tokenizer"]).expanduser())
    if data["source"] == "stdlib":
        return TokenizerSource(Path(load_stdlib_corpus(DataConfig.model_validate(data)).train))
    folder = Path(data["train"][0]["path"]).expanduser()
    return TokenizerSource(folder, verify_prepared(folder).tokenizer.eod_token)


def tokenizer_at(path: Path) -> TokenizerSource:
    """Return the tokenizer at a path that a user gave; it may be the tokenizer folder of a fine-tuning run."""
    return TokenizerSource(path, is_chat_format=path.name == TOKENIZER_FOLDER and (path.parent / CONFIG).is_file())


def published_folders(checkpoint: Path) -> Iterator[Path]:
    """Yield the published model and tokenizer folders that a run started from, as far as they still exist.

    A prepared corpus or a run directory keeps tokenizer.json alone; these folders have the files beside it.
    """
    seen: set[Path] = set()
    start: Path | None = checkpoint
    while start is not None and start not in seen:
        seen.add(start)
        yield start / KEPT
        config = _run_config(start) or {"data": {}, "checkpoint": {}}
        if tokenizer := config["data"].get("tokenizer"):
            yield Path(tokenizer).expanduser()
        start = _checkpoint_at(config["checkpoint"].get("load"))


def _run_config(checkpoint: Path) -> dict[str, Any] | None:
    file = checkpoint.parent.parent / CONFIG
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None


def _checkpoint_at(path: str | None) -> Path | None:
    try:
        return find(Path(path).expanduser()) if path else None
    # deleted since the run: its files are not needed
    except UserError:
        return None
