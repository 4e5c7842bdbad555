"""Which prepared folders a run reads, checked against each other, the tokenizer and the model.

Free of torch: a blend that cannot work is refused before anything heavy is built.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.config.data import BlendPart
from megatron_q3n.data.manifest import Manifest, verify_prepared
from megatron_q3n.data.stdlib import corpus_of
from megatron_q3n.data.tokenizer import TextTokenizer, fingerprint_of


@dataclass(frozen=True)
class Part:
    """A checked prepared folder and its share of a blend."""

    path: Path
    weight: float
    manifest: Manifest


@dataclass(frozen=True)
class Blends:
    """The folders of a run and the one tokenizer they share."""

    train: tuple[Part, ...]
    validation: tuple[Part, ...]
    tokenizer: TextTokenizer


def load_blends(config: RunConfig) -> Blends:
    """Check the folders of a run and load their tokenizer; prepares the standard library if that is the source.

    Raises: UserError for missing or damaged folders, a tokenizer that is not theirs or larger than the model, or
        less data than one sequence.
    """
    data = config.data
    if data.source == "stdlib":
        corpus = corpus_of(data)
        train = [BlendPart(path=str(corpus.train))]
        validation = [BlendPart(path=str(corpus.validation))]
    else:
        train, validation = data.train, data.validation
    if not validation:
        raise UserError(
            "data.validation is empty: give at least one folder of held-out text, made by "
            "tools/prepare_data.py with the tokenizer of the training data."
        )
    parts = {"data.train": prepared_parts(train), "data.validation": prepared_parts(validation)}
    _check_length(parts, config.training.sequence_length)
    tokenizer = _tokenizer(data.tokenizer, parts)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer of {parts['data.train'][0].path} has {tokenizer.vocab_size} entries, more than "
            f"model.vocab_size={config.model.vocab_size}; set model.vocab_size to at least that."
        )
    return Blends(parts["data.train"], parts["data.validation"], tokenizer)


def prepared_parts(blend: list[BlendPart]) -> tuple[Part, ...]:
    """Check each folder of a blend.

    Raises: UserError for one that is missing or damaged.
    """
    return tuple(
        Part(Path(part.path).expanduser().absolute(), part.weight, verify_prepared(part.path)) for part in blend
    )


def _check_length(parts: dict[str, tuple[Part, ...]], sequence_length: int) -> None:
    """Refuse folders that do not fill one row: a sequence and the token that follows it."""
    for where, blend in parts.items():
        for part in blend:
            if part.manifest.num_tokens <= sequence_length:
                raise UserError(
                    f"{where}: {part.path} holds {part.manifest.num_tokens} tokens, less than one sample of "
                    f"training.sequence_length={sequence_length} plus 1. Add text or shorten the sequence."
                )


def _tokenizer(setting: str | None, parts: dict[str, tuple[Part, ...]]) -> TextTokenizer:
    """Load the tokenizer all folders were made with.

    Raises: UserError if folders differ, or `data.tokenizer` is another one.
    """
    first = parts["data.train"][0]
    expected = first.manifest.tokenizer
    for where, blend in parts.items():
        for part in blend:
            if part.manifest.tokenizer != expected:
                raise UserError(
                    f"{where}: {part.path} was made with tokenizer {_name(part)}, {first.path} with "
                    f"{_name(first)}. All folders of a run need one tokenizer: make one of them again "
                    f"with --tokenizer {first.path}."
                )
    if setting is not None and fingerprint_of(setting) != expected.fingerprint:
        raise UserError(
            f"data.tokenizer={setting} has fingerprint {fingerprint_of(setting)[:12]}…, but {first.path} was "
            f"made with tokenizer {_name(first)}. Leave data.tokenizer null (the folder's own is used), or "
            f"prepare the data again with --tokenizer {setting}."
        )
    return TextTokenizer.load(first.path, expected.eod_token)


def _name(part: Part) -> str:
    record = part.manifest.tokenizer
    return f"{record.fingerprint[:12]}… ({record.vocab_size} entries, ends documents with {record.eod_token})"
