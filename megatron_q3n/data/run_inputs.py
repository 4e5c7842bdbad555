"""Inputs of a run, recorded in its directory (data.json): settings and contents that fix what each step trains on.

The position in the data is a function of the step. If a path leads to another text after a resume, the same step would
silently repeat some text and skip other. So the digests of prepared text, tokenizers, conversations and prompts are
recorded when a run begins, and compared before it goes on. What is hashed is found by the type of a setting
(`DataPath`), in the sections that the stage reads. No torch here: a change is refused at once.
"""

import hashlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.config.override_text import shell_override
from megatron_q3n.config.paths import path_settings
from megatron_q3n.config.plain_yaml import read_mapping
from megatron_q3n.config.run_sections import RunSections
from megatron_q3n.config.section import Section
from megatron_q3n.config.sft import TaskSet
from megatron_q3n.data.content_digest import content_digest
from megatron_q3n.data.manifest import verify_prepared
from megatron_q3n.data.stdlib import corpus_key

RECORD_FILE = "data.json"
# settings of `data` that do not change what a step trains on
_FREE_DATA_SETTINGS = {"cache_dir", "num_workers", "accept_changed_contents"}
_BATCH_SETTINGS = ("seed", "global_batch_size", "sequence_length")
# the package that generates the questions of task sets
_TASK_PACKAGE = "reasoning-gym"


class InputRecord(Section):
    """The content of data.json. `accepted` lists the changes that `data.accept_changed_contents` allowed."""

    settings: dict[str, Any]
    contents: dict[str, str]
    start_checkpoint: str | None = None
    accepted: list[dict[str, Any]] = Field(default_factory=list)

    @classmethod
    def of(cls, config: RunConfig) -> "InputRecord":
        """Record the inputs of a configuration; reads every file of conversations and prompts.

        Raises: UserError for inputs that are missing or damaged.
        """
        contents = input_contents(config)
        return cls(settings=_settings(config), contents=contents, start_checkpoint=config.checkpoint.load)

    @classmethod
    def read(cls, run_dir: Path) -> "InputRecord | None":
        """Return a run's record, or None for a run from before there were any.

        Raises: UserError if it is damaged.
        """
        path = run_dir / RECORD_FILE
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise UserError(
                f"{path} is damaged ({problem}). Restore it from a copy, or delete it to resume without a comparison "
                "of the data."
            ) from None

    def write(self, run_dir: Path) -> None:
        """Write data.json, atomically."""
        partial = run_dir / f".{RECORD_FILE}.{os.getpid()}"
        partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        os.replace(partial, run_dir / RECORD_FILE)


def check_same_inputs(run_dir: Path, config: RunConfig) -> None:
    """Check that a run is resumed with the settings and contents that it began with; record accepted changes.

    Raises: UserError naming what changed.
    """
    record = InputRecord.read(run_dir)
    before = record.settings if record else _settings_of_file(run_dir / "config.yaml", config)
    now = _settings(config)
    differences = [
        f"{name}: {before.get(name)} there, {value} here" for name, value in now.items() if before.get(name) != value
    ]
    if differences:
        raise UserError(
            f"{run_dir} cannot be resumed with other data or batches: {'; '.join(differences)}. "
            f"Set them back, or start a new run from its weights: {shell_override('checkpoint.load', run_dir)}"
        )
    if record is not None:
        _compare_contents(run_dir, record, config)


def input_contents(config: RunConfig) -> dict[str, str]:
    """Return the digest of each input that the stage reads, by the setting that leads to it.

    Raises: UserError for inputs that are missing or damaged.
    """
    contents: dict[str, str] = {}
    for section in data_sections(config):
        if section == "data" and config.data.source == "stdlib":
            contents["data.source=stdlib"] = corpus_key(config.data)
        for name, path, mark in path_settings(getattr(config, section), f"{section}."):
            if mark.role == "data":
                contents |= {
                    f"{name}={path} ({part})": digest
                    for part, digest in _digests(Path(path), is_prepared=section == "data").items()
                }
        if any(_task_sets(getattr(config, section))):
            contents[f"{section}: the version of {_TASK_PACKAGE}"] = _version(_TASK_PACKAGE)
    return contents


def _compare_contents(run_dir: Path, record: InputRecord, config: RunConfig) -> None:
    now = input_contents(config)
    names = dict.fromkeys((*record.contents, *now))
    changed = {name: (record.contents.get(name), now.get(name)) for name in names}
    changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
    if not changed:
        return
    if not config.data.accept_changed_contents:
        shown = "; ".join(
            f"{name}: {_short(old)} when it began, {_short(new)} now" for name, (old, new) in changed.items()
        )
        raise UserError(
            f"{run_dir} cannot be resumed on other contents than it began with: {shown}. Restore them, start a new "
            f"run from its weights ({shell_override('checkpoint.load', run_dir)}), or go on with "
            "data.accept_changed_contents=true, "
            "which is recorded."
        )
    accepted = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "changed": changed}
    record.model_copy(update={"contents": now, "accepted": [*record.accepted, accepted]}).write(run_dir)


def data_sections(config: RunSections) -> list[str]:
    """Return the sections whose data the stage trains on."""
    if config.stage == "mtp":
        return ["sft"] if config.sft.train else ["data"]
    # post-training stages have a section of their own name
    return [config.stage] if config.stage in type(config).model_fields else ["data"]


def _settings(config: RunSections) -> dict[str, Any]:
    """Return the settings that fix the data and its order, by dotted name."""
    tree = config.model_dump(mode="json")
    names = {"training": set(_BATCH_SETTINGS), "data": set(tree["data"]) - _FREE_DATA_SETTINGS}
    names |= {section: set(tree[section]) for section in data_sections(config)} | {"data": names["data"]}
    return {f"{section}.{name}": tree[section][name] for section in names for name in sorted(names[section])}


def _settings_of_file(path: Path, config: RunConfig) -> dict[str, Any]:
    """Return the settings of a run without a record, from its config.yaml."""
    if not path.is_file():
        return _settings(config)
    try:
        return _settings(RunSections.model_validate(read_mapping(path)))
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{path}: {name}: {problem['msg']}. Restore the file from a copy.") from None


def _digests(path: Path, *, is_prepared: bool) -> dict[str, str]:
    """Return the digests of a prepared folder by part, or of a file or another folder as a whole."""
    if is_prepared:
        manifest = verify_prepared(path)
        text = f"{manifest.documents_bin.sha256} {manifest.documents_idx.sha256}"
        return {"text": hashlib.sha256(text.encode()).hexdigest(), "tokenizer": manifest.tokenizer.fingerprint}
    return {"contents": content_digest(path)}


def _task_sets(section: Section) -> Iterator[TaskSet]:
    """Yield the task sets below a section."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, TaskSet):
                yield item
            elif isinstance(item, Section):
                yield from _task_sets(item)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _short(digest: str | None) -> str:
    return "absent" if digest is None else digest if len(digest) < 32 else f"SHA-256 {digest[:12]}…"
