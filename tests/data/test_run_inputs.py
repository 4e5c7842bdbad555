"""Inputs of a run: every change of what a path leads to is refused on resume, by its setting; or accepted and recorded.

The whole command line: tests/stages/test_preparation.py.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_q3n.config import RunConfig, UserError, validate
from megatron_q3n.data.run_inputs import InputRecord, check_same_inputs, input_contents
from megatron_q3n.data.tokenizer import TextTokenizer, train_bpe
from tests.data.conftest import TEXTS, MakeConfig, MakeData

ROWS = [json.dumps({"messages": [{"role": "user", "content": str(i)}]}) + "\n" for i in range(5)]


def begin(run_dir: Path, config: RunConfig) -> None:
    run_dir.mkdir(exist_ok=True)
    InputRecord.of(config).write(run_dir)


def refused(run_dir: Path, config: RunConfig) -> str:
    with pytest.raises(UserError) as error:
        check_same_inputs(run_dir, config)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.fixture
def blend(make_data: MakeData, make_config: MakeConfig) -> RunConfig:
    return make_config([make_data("train", TEXTS[:20])], [make_data("held-out", TEXTS[20:])])


def test_text_prepared_again_is_refused_if_it_differs(blend: RunConfig, make_data: MakeData, tmp_path: Path) -> None:
    begin(tmp_path / "run", blend)
    make_data("train", TEXTS[:20], force=True)
    check_same_inputs(tmp_path / "run", blend)
    make_data("train", TEXTS[1:20], force=True)
    message = refused(tmp_path / "run", blend)
    assert f"data.train.0.path={tmp_path / 'train'} (text): SHA-256" in message
    assert "(tokenizer)" not in message
    assert "validation" not in message


def test_another_tokenizer_is_refused(blend: RunConfig, make_data: MakeData, tmp_path: Path) -> None:
    begin(tmp_path / "run", blend)
    other: TextTokenizer = train_bpe(TEXTS, 290)
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other")
    make_data("held-out", TEXTS[20:], force=True, tokenizer=tmp_path / "other")
    message = refused(tmp_path / "run", blend)
    assert f"data.validation.0.path={tmp_path / 'held-out'} (tokenizer)" in message


CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "edited": lambda rows: [rows[0].replace("0", "7"), *rows[1:]],
    "shortened": lambda rows: rows[:-1],
    "extended": lambda rows: [*rows, rows[0]],
    "reversed": lambda rows: rows[::-1],
}


def _sources(stage: str, path: Path) -> dict[str, Any]:
    sources = {
        "sft": {"sft": {"train": [{"path": str(path)}]}},
        "sft validation": {"sft": {"train": [{"task": {"name": "chain_sum"}}], "validation": [{"path": str(path)}]}},
        "rl": {"rl": {"prompts": [{"path": str(path)}], "reward": {"kind": "math_verify"}}},
        "mtp": {"sft": {"train": [{"path": str(path)}]}},
    }
    return {"stage": stage.split()[0], "training": {"micro_batch_size": 1}, **sources[stage]}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("stage", ["sft", "sft validation", "rl", "mtp"])
def test_changed_conversations_and_prompts_are_refused(tmp_path: Path, stage: str, change: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(ROWS))
    config = validate(_sources(stage, path))
    begin(tmp_path, config)
    check_same_inputs(tmp_path, config)
    path.write_text("".join(CHANGES[change](ROWS)))
    assert f"path={path} (contents): SHA-256" in refused(tmp_path, config)
    path.unlink()
    assert f"{path}: No such file" in refused(tmp_path, config)


def test_a_changed_folder_of_conversations_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name in ("a.arrow", "b.arrow"):
        (folder / name).write_text(name)
    config = validate(_sources("sft", folder))
    begin(tmp_path, config)
    (folder / "b.arrow").write_text("c")
    assert "(contents)" in refused(tmp_path, config)


def test_an_accepted_change_is_recorded_and_compared_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(ROWS))
    config = validate(_sources("sft", path))
    begin(tmp_path, config)
    before = input_contents(config)
    path.write_text("".join(ROWS[::-1]))
    accepting = validate(_sources("sft", path) | {"data": {"accept_changed_contents": True}})
    check_same_inputs(tmp_path, accepting)
    record = InputRecord.read(tmp_path)
    assert record is not None
    name = f"sft.train.0.path={path} (contents)"
    assert record.accepted[0]["changed"] == {name: [before[name], input_contents(config)[name]]}
    check_same_inputs(tmp_path, config)
    path.write_text("".join(ROWS))
    refused(tmp_path, config)


@pytest.mark.parametrize(
    ("section", "changed"),
    [
        ("training", {"sequence_length": 128}),
        ("training", {"global_batch_size": 8}),
        ("training", {"seed": 7}),
        ("data", {"stdlib_validation_percent": 7.0}),
    ],
)
def test_settings_are_compared_with_the_record_and_not_with_config_yaml(
    tmp_path: Path, section: str, changed: dict[str, Any]
) -> None:
    """An edit of config.yaml changes both the run's settings and the file they could be compared with."""
    begin(tmp_path, validate({}))
    edited = validate({section: changed})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(edited.model_dump(mode="json")))
    name = next(iter(changed))
    assert f"{section}.{name}: {getattr(getattr(validate({}), section), name)} there" in refused(tmp_path, edited)
    check_same_inputs(tmp_path, validate({"data": {"num_workers": 2}, "training": {"steps": 2000}}))


def test_a_run_without_a_record_is_compared_with_its_config_yaml(tmp_path: Path) -> None:
    check_same_inputs(tmp_path, validate({}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"training": {"seed": 7}}))
    check_same_inputs(tmp_path, validate({"training": {"seed": 7}}))
    assert "training.seed: 7 there, 1234 here" in refused(tmp_path, validate({}))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"settings": 1}'])
def test_a_damaged_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.json").write_text(content)
    assert "data.json is damaged" in refused(tmp_path, validate({}))


def test_missing_text_is_refused_before_a_run_begins(blend: RunConfig, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(UserError, match="does not exist"):
        InputRecord.of(blend)


def test_a_glob_pattern_is_digested_by_its_matches(tmp_path: Path) -> None:
    from megatron_q3n.data.content_digest import content_digest

    for name, text in (("a.jsonl", "1"), ("b.jsonl", "2"), ("c.txt", "3")):
        (tmp_path / name).write_text(text)
    pattern = str(tmp_path / "*.jsonl")
    before = content_digest(pattern)
    (tmp_path / "c.txt").write_text("4")
    assert content_digest(pattern) == before
    (tmp_path / "b.jsonl").write_text("5")
    assert content_digest(pattern) != before
    with pytest.raises(UserError, match="No such file"):
        content_digest(str(tmp_path / "*.csv"))
