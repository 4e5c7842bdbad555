"""Path settings: absolute in every section, from any folder, and none without its type."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from megatron_q3n.config import RunConfig, UserError, validate
from megatron_q3n.config.paths import PathMark, path_settings
from megatron_q3n.config.section import Section

# every path setting once, relative or below ~; pretrain uses none of the sections that need more settings
RELATIVE: dict[str, Any] = {
    "run_dir": "../run",
    "runs_dir": "~/runs",
    "data": {
        "source": "blend",
        "cache_dir": "~/cache",
        "train": [{"path": "corpora/a"}, {"path": "~/b"}],
        "validation": [{"path": "c d"}],
        "tokenizer": "./tokenizer.json",
    },
    "checkpoint": {"load": "runs/latest"},
    "sft": {
        "train": [{"path": "chat.jsonl"}],
        "validation": [{"path": "~/v.jsonl"}],
        "chat_template": "template.jinja",
    },
    "rl": {
        "prompts": [{"path": "prompts.jsonl"}],
        "held_out": [{"path": "held.jsonl"}],
        "rollout": {"weight_sync_dir": "weights"},
        "reward": {"kind": "function", "function": "mine:score", "readable_paths": ["tables", "~/lists"]},
    },
    "evaluate": {"sets": [{"name": "x", "path": "x"}], "tasks_dir": "tasks", "tokenizer": "t", "output": "out.json"},
    "inference": {"tokenizer": "t", "output": "~/out.jsonl"},
}
# string settings whose descriptions or names mention files, and that are no paths
NO_PATHS = {
    "callbacks.path": "an import path",
    "data.stdlib_packages": "split by folder",
    "recipe": "part of the run directory's name",
    **{f"{name}.columns": "names of columns" for name in ("sft.train", "sft.validation", "rl.prompts", "rl.held_out")},
}


def test_every_path_is_absolute_wherever_the_run_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "somewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = {name: value for name, value, _ in path_settings(validate(RELATIVE))}
    expected = {name: _expected(value, folder, tmp_path / "home") for name, value in _leaves(RELATIVE)}
    assert found == expected
    # each path setting is among them
    assert set(map(_without_index, found)) == set(_marked(RunConfig))
    # config.yaml, read elsewhere, is the same run
    saved = validate(RELATIVE).model_dump(mode="json")
    monkeypatch.chdir("/")
    assert validate(saved).model_dump(mode="json") == saved


def test_a_template_is_no_path() -> None:
    template = "{{ messages[0].content }}"
    assert validate({"sft": {"chat_template": template}}).sft.chat_template == template


@pytest.mark.parametrize("path", ["", " ", "a\0b"])
def test_an_empty_path_is_refused_by_its_name(path: str) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.load=.*give the path of a file or folder") as refused:
        validate({"checkpoint": {"load": path}})
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".hidden", "a\nb"])
def test_the_recipes_name_cannot_lead_out_of_the_runs_folder(name: str) -> None:
    with pytest.raises(UserError, match="recipe="):
        validate({"recipe": name})


def test_no_setting_of_a_file_lacks_the_type() -> None:
    """A new path setting with a plain `str` would stay relative."""
    marked = set(_marked(RunConfig))
    mentions = re.compile(r"\b(file|folder|director(y|ies)|path)\b")
    lacking = {name for name, text in _texts(RunConfig) if mentions.search(text)} - marked
    assert lacking == set(NO_PATHS), "declare it as FilePath or DataPath (config/paths.py)"


def _expected(value: str, folder: Path, home: Path) -> str:
    return str(home / value[2:]) if value.startswith("~/") else str(folder / value)


def _without_index(name: str) -> str:
    return re.sub(r"\.\d+", "", name)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the strings of a tree that are paths, by dotted name."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for name, value in entries:
        if isinstance(value, dict | list):
            yield from _leaves(value, f"{prefix}{name}.")
        elif name not in ("source", "name", "kind", "function"):
            yield f"{prefix}{name}", value


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for member in get_args(annotation):
        yield from _sections(member)


def _marked(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if any(isinstance(mark, PathMark) for mark in (*field.metadata, *_metadata(field.annotation))):
            yield f"{prefix}{name}"
        for inner in _sections(field.annotation):
            yield from _marked(inner, f"{prefix}{name}.")


def _metadata(annotation: Any) -> Iterator[Any]:
    for member in get_args(annotation):
        yield from getattr(member, "__metadata__", ())


def _texts(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each setting of text with its name and description."""
    for name, field in section.model_fields.items():
        if "str" in str(field.annotation) and not list(_sections(field.annotation)):
            yield f"{prefix}{name}", f"{name.replace('_', ' ')} {field.description or ''}"
        for inner in _sections(field.annotation):
            yield from _texts(inner, f"{prefix}{name}.")
