"""Composition on the command line and on resume: an override means the same in both, and a file stands for itself.

Recipes and their parts: tests/test_recipes.py. Messages for wrong values: tests/test_bad_input.py.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.config.plain_yaml import read_mapping
from megatron_q3n.recipe import configure, register_defaults

ODD_TEXTS = [
    *(r"echo ${HOME}", r"a \${b}", r"a \\${b", "${", "$", "1e5", "0x10", "null", "true", "???", "a: b", "- x", "x\\"),
    *("\u2028", "\ufeff", "é", " ", "~", "#", "'", '"'),
]


@pytest.fixture(autouse=True)
def defaults() -> None:
    register_defaults()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run of pretrain-tiny, with no more than its config.yaml."""
    register_defaults()
    folder = tmp_path_factory.mktemp("run")
    write(folder, configure(["--config-name", "pretrain-tiny"]))
    return folder


def write(folder: Path, config: RunConfig, **changes: Any) -> None:
    """Write config.yaml as run_directory.open_directory does."""
    tree = config.model_dump(mode="json") | {"run_dir": None} | changes
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


def started(*overrides: str) -> RunConfig:
    return configure(["--config-name", "pretrain-tiny", *overrides])


def resumed(run_dir: Path, *overrides: str) -> RunConfig:
    config = configure(["--resume", str(run_dir), *overrides])
    assert config.run_dir == str(run_dir.resolve())
    return config.model_copy(update={"run_dir": None})


@pytest.mark.parametrize("overrides", [[], ["training.steps=900"]], ids=["unchanged", "changed"])
def test_texts_of_a_run_are_the_same_on_resume(tmp_path: Path, overrides: list[str]) -> None:
    config = started()
    samples = config.samples.model_copy(update={"prompts": ODD_TEXTS})
    write(tmp_path, config.model_copy(update={"samples": samples}))
    assert resumed(tmp_path, *overrides).samples.prompts == ODD_TEXTS


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.text(st.sampled_from("\\${}a:. '\"")), max_size=4))
def test_any_text_of_a_run_is_the_same_on_resume(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    config, folder = started(), tmp_path_factory.mktemp("run")
    write(folder, config.model_copy(update={"samples": config.samples.model_copy(update={"prompts": texts})}))
    assert resumed(folder, "training.steps=900").samples.prompts == texts


@pytest.mark.parametrize(
    "override",
    [
        "schedule={lr: 1e-3}",
        "schedule.lr=1e-3",
        "training.steps=800",
        "samples.prompts=[a,'b,c']",
        "samples.prompts=[]",
        r'samples.prompts=["echo \${HOME}"]',
        "samples.prompts=['${recipe}']",
        "callbacks=[{path: my.Class, arguments: {a: {b: [1, 2]}}}]",
        "model.megatron.hidden_dropout=0.1",
        "model.megatron={hidden_dropout: 0.1}",
        "training.threads=2",
        "++training.steps=800",
        "data.cache_dir=~/corpora",
    ],
)
def test_an_override_means_the_same_at_a_start_and_on_resume(run_dir: Path, override: str) -> None:
    changed = started(override)
    assert resumed(run_dir, override) == changed
    assert changed != started()


def test_a_section_merges_into_the_runs(run_dir: Path) -> None:
    before, after = resumed(run_dir).schedule, resumed(run_dir, "schedule={lr: 1e-3}").schedule
    assert after == before.model_copy(update={"lr": 1e-3})


def test_settings_that_an_older_run_lacks_have_their_defaults(run_dir: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    del tree["alerts"], tree["validation"]["batches"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    config = resumed(tmp_path, "validation.batches=3", "alerts.pause_steps=7")
    assert (config.validation.batches, config.alerts.pause_steps) == (3, 7)


OVERRIDES_REFUSED = {
    "~data": "~data: a setting cannot be removed",
    "~training.steps": "~training.steps: a setting cannot be removed",
    "=3": "=3: the name of a setting is missing",
    "stage=[]": "stage=[]: stage is chosen by the name of a part, one of evaluate, generate",
    "model=5": "model=5: model is chosen by the name of a part, one of 1b_a100m",
    "model=null": "model=null: model is chosen by the name of a part",
    "model={hidden_size: 64}": "model is chosen by the name of a part",
    "+stage=sft": "leave out the +",
    "training=null": "training=null: training is a section; set its settings, e.g. training.steps=…",
    "training=[]": "training=[]: training is a section",
    "logging.wandb=disabled": "logging.wandb is a section; set its settings, e.g. logging.wandb.mode=…",
    "training.steps=1,2": "several values; run one at a time",
    "hydra.run.dir=elsewhere": "hydra.run.dir=elsewhere has no effect: run directories are set with run_dir=",
    "": "Write setting=value",
    "run_dir=/a(b": "goes into quotes",
    "samples.prompts=['${HOME}']": r"for these characters themselves write \${…}",
}


@pytest.mark.parametrize("override", OVERRIDES_REFUSED)
def test_overrides_without_a_meaning_are_refused_in_one_line(run_dir: Path, override: str) -> None:
    for begin in (["--config-name", "pretrain-tiny"], ["--resume", str(run_dir)]):
        with pytest.raises(UserError) as refused:
            configure([*begin, override])
        assert OVERRIDES_REFUSED[override] in str(refused.value)
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run_dir=elsewhere", "run_dir=elsewhere has no effect with --resume"),
        ("runs_dir=elsewhere", "runs_dir=elsewhere has no effect with --resume"),
        ("model=small", "model=small: parts are chosen when a run starts"),
    ],
)
def test_overrides_of_a_start_are_refused_on_resume(run_dir: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        configure(["--resume", str(run_dir), override])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-name", "model/tiny"], r"is a part of recipes, not a recipe.*pretrain-tiny model=tiny"),
        (["--config-name", "pretrain-tiny", "--config-dir", "absent"], "--config-dir absent: no such folder"),
    ],
)
def test_recipes_that_are_none_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configure(arguments)


FILES = {
    "a list": (b"- 1\n- 2\n", "found a list"),
    "a scalar": (b"hello\n", "found the single value 'hello'"),
    "empty": (b"", "found nothing"),
    "binary": (b"\x80\x04\x95\xff\x00", "cannot be read"),
    "control characters": (b"a: \x00\x01", "is not YAML"),
    "no YAML": (b"a: [1\nb: }", "is not YAML"),
    "a number as a name": (b"1: 2\n", "1 is no name of a setting"),
    "nested too deeply": (b"a: " + b"[" * 5000, "is not YAML"),
    "a list as a name": (b"[1]: 2\n", "is not YAML"),
    "exploding aliases": (
        b"a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 10)) for n in range(98, 107)),
        "its aliases expand to more than 100,000 values",
    ),
    "a list that contains itself": (b"a: &a [*a]\n", "its aliases expand"),
    "a bad date": (b"a: 2020-13-45\n", "is not YAML"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_settings_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = FILES[name]
    for place, arguments in (
        ("config.yaml", ["--resume", str(tmp_path)]),
        ("mine.yaml", ["--config-dir", str(tmp_path), "--config-name", "mine"]),
    ):
        (tmp_path / place).write_bytes(content)
        with pytest.raises(UserError) as refused:
            configure(arguments)
        assert message in str(refused.value)
        assert str(tmp_path / place) in str(refused.value)
        assert len(str(refused.value).splitlines()) == 1


def test_aliases_within_bounds_are_expanded(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a {b: 1}\nc: [*a, *a]\n")
    assert read_mapping(tmp_path / "x.yaml") == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}
