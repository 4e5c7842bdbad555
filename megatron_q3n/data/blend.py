"""Data blends: the prepared folders of a run, checked against each other, the tokenizer and the model.

No torch here: an invalid blend is refused before slow imports and large allocations.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.config.data import BlendPart
from megatron_q3n.data.manifest import Manifest, verify_prepared
from megatron_q3n.data.stdlib import load_stdlib_corpus
from megatron_q3n.data.tokenizer import TextTokenizer, fingerprint_of


@dataclass(frozen=True)
class PreparedFolder:
    """A verified prepared folder and its weight in a blend."""

    path: Path
    weight: float
    manifest: Manifest


@dataclass(frozen=True)
class Blends:
    """The prepared folders of a run and their common tokenizer."""

    train: tuple[PreparedFolder, ...]
    validation: tuple[PreparedFolder, ...]
    tokenizer: TextTokenizer


def load_blends(config: RunConfig) -> Blends:
    """Check the folders of a run and load their tokenizer; with data.source=stdlib prepare that corpus first.

    Raises: UserError for missing or damaged folders, different tokenizers, a tokenizer larger than the model's
        vocabulary, or less data than one sequence.
    """
    data = config.data
    if data.source == "stdlib":
        corpus = load_stdlib_corpus(data)
        train = [BlendPart(path=str(corpus.train))]
        validation = [BlendPart(path=str(corpus.validation))]
    else:
        train, validation = data.train, data.validation
    if not validation:
        raise UserError(
            "data.validation is empty: give at least one folder of held-out text, made by "
            "tools/prepare_data.py with the tokenizer of the training data."
        )
    blends = {"data.train": verify_folders(train), "data.validation": verify_folders(validation)}
    _check_length(blends, config.training.sequence_length)
    tokenizer = _load_tokenizer(data.tokenizer, blends)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer of {blends['data.train'][0].path} has {tokenizer.vocab_size} entries, more than "
            f"model.vocab_size={config.model.vocab_size}; set model.vocab_size to at least that."
        )
    return Blends(blends["data.train"], blends["data.validation"], tokenizer)


def verify_folders(blend: list[BlendPart]) -> tuple[PreparedFolder, ...]:
    """Check each folder of a blend against its manifest.

    Raises: UserError for a missing or damaged folder.
    """
    return tuple(
        PreparedFolder(Path(part.path).expanduser().absolute(), part.weight, verify_prepared(part.path))
        for part in blend
    )


def _check_length(blends: dict[str, tuple[PreparedFolder, ...]], sequence_length: int) -> None:
    """Refuse folders with less than one sample: a sequence and the token that follows it."""
    for setting, blend in blends.items():
        for folder in blend:
            if folder.manifest.num_tokens <= sequence_length:
                raise UserError(
                    f"{setting}: {folder.path} holds {folder.manifest.num_tokens} tokens, less than one sample of "
                    f"training.sequence_length={sequence_length} plus 1. Add text or shorten the sequence."
                )


def _load_tokenizer(setting: str | None, blends: dict[str, tuple[PreparedFolder, ...]]) -> TextTokenizer:
    """Load the tokenizer that all folders were prepared with.

    Raises: UserError if the folders' tokenizers differ, or `data.tokenizer` is another one.
    """
    first = blends["data.train"][0]
    expected = first.manifest.tokenizer
    for name, blend in blends.items():
        for folder in blend:
            if folder.manifest.tokenizer != expected:
                raise UserError(
                    f"{name}: {folder.path} was made with tokenizer {_describe(folder)}, {first.path} with "
                    f"{_describe(first)}. All folders of a run need one tokenizer: make one of them again "
                    f"with --tokenizer {shlex.quote(str(first.path))}."
                )
    if setting is not None and fingerprint_of(setting) != expected.fingerprint:
        raise UserError(
            f"data.tokenizer={setting} has fingerprint {fingerprint_of(setting)[:12]}…, but {first.path} was "
            f"made with tokenizer {_describe(first)}. Leave data.tokenizer null (the folder's own is used), or "
            f"prepare the data again with --tokenizer {shlex.quote(str(setting))}."
        )
    return TextTokenizer.load(first.path, expected.eod_token)


def _describe(folder: PreparedFolder) -> str:
    record = folder.manifest.tokenizer
    return f"{record.fingerprint[:12]}… ({record.vocab_size} entries, ends documents with {record.eod_token})"
