"""Preparation of runs: inputs that are missing or unusable, refused before torch is imported and by their setting;
changed data on resume; and what a refused run leaves behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_q3n.config import RunConfig, UserError, validate
from megatron_q3n.recipe import configure, register_defaults
from megatron_q3n.stages.preparation import rehearse
from tests import forked

Run = Callable[..., Any]
SMALL = [
    *("model.num_layers=4", "model.hidden_size=64", "training.sequence_length=64", "training.global_batch_size=2"),
    *("schedule.warmup_steps=0", "validation.batches=1", "logging.wandb.mode=disabled", "samples.count=0"),
]
SFT = [
    *("--config-name", "sft-tiny", "sft.train=[{path: conversations.jsonl}]", "sft.validation=[]"),
    *("sft.validation_percent=30", "sft.chat_template=null", "sft.tokenizer_vocab_size=280"),
]


def write_conversations(path: Path, count: int) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "seven"}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_goes_on_with_changed_conversations_only_if_that_is_accepted(tmp_path: Path, run_module: Run) -> None:
    file = tmp_path / "conversations.jsonl"
    write_conversations(file, 40)
    first = run_module(*SFT, *SMALL, "training.steps=2", "run_dir=run")
    assert first.returncode == 0, first.stderr
    assert json.loads((tmp_path / "run/data.json").read_text())["accepted"] == []
    write_conversations(file, 39)
    again = ("--resume", "run", "training.steps=4")
    refused = run_module(*again)
    assert refused.returncode == 2
    assert f"sft.train.0.path={file} (contents): SHA-256" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    accepted = run_module(*again, "data.accept_changed_contents=true")
    assert accepted.returncode == 0, accepted.stderr
    record = json.loads((tmp_path / "run/data.json").read_text())
    assert list(record["accepted"][0]["changed"]) == [f"sft.train.0.path={file} (contents)"]
    # for that start only
    write_conversations(file, 38)
    assert run_module("--resume", "run", "training.steps=6").returncode == 2


def test_accepting_changes_of_a_new_run_is_refused(run_module: Run) -> None:
    done = run_module("--config-name", "pretrain-tiny", "data.accept_changed_contents=true")
    assert done.returncode == 2
    assert "data.accept_changed_contents=true has no effect on a new run" in done.stderr


def test_a_refused_run_does_not_take_over_latest(tmp_path: Path, run_module: Run) -> None:
    pretrain = ["--config-name", "pretrain-tiny", *SMALL, "training.micro_batch_size=2", "training.steps=1"]
    for name in ("first", "second"):
        done = run_module(*pretrain, "validation.bigram_baseline=false", f"run_dir=runs/{name}")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "runs/latest").resolve().name == name
    refused = run_module("--resume", "runs/first")
    assert refused.returncode == 2
    assert "already at step 1 of 1" in refused.stderr
    assert (tmp_path / "runs/latest").resolve().name == "second"
    resumed = run_module("--resume", "runs/first", "training.steps=2")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "runs/latest").resolve().name == "first"


MISSING = {
    "checkpoint": (["checkpoint.load=nothing"], "checkpoint.load={cwd}/nothing: no checkpoint found"),
    "blend": (["data=blend"], "data.train.0.path={cwd}/corpora/train does not exist. Create it with tools/prepare"),
    "conversations": (
        ["stage=sft", "sft.train=[{path: absent.jsonl}]"],
        "sft.train.0.path={cwd}/absent.jsonl does not exist. Correct the path.",
    ),
    "prompts": (
        ["stage=rl", "rl.prompts=[{path: absent.jsonl}]", "rl.reward.kind=math_verify", "training.micro_batch_size=1"],
        "rl.prompts.0.path={cwd}/absent.jsonl does not exist",
    ),
    "template": (
        ["stage=sft", "sft.train=[{task: {name: chain_sum}}]", "sft.chat_template=absent.jinja"],
        "sft.chat_template={cwd}/absent.jinja does not exist",
    ),
    "task folder": (
        ["stage=evaluate", "checkpoint.load=nothing", "evaluate.tasks=[a]", "evaluate.tasks_dir=tasks"],
        "evaluate.tasks_dir={cwd}/tasks does not exist",
    ),
}
RL = ["stage=rl", "rl.prompts=[{path: prompts.jsonl}]", "rl.reward.kind=function", "training.micro_batch_size=1"]
UNUSABLE = {
    "module": ([*RL, "rl.reward.function=absent:score"], "rl.reward.function=absent:score: there is no module absent"),
    "submodule": ([*RL, "rl.reward.function=json.absent:score"], "there is no module json.absent"),
    "function": ([*RL, "rl.reward.function=graders:scoer"], "graders.py defines no scoer. Did you mean 'score'?"),
    "syntax": ([*RL, "rl.reward.function=broken:score"], "broken.py is not Python"),
    "callback": (
        ["callbacks=[{path: graders.Absent}]"],
        "callbacks[0]: path=graders.Absent: {cwd}/graders.py defines no",
    ),
    "no data set": (
        ["data=blend", "data.train=[{path: .}]", "data.validation=[{path: .}]"],
        "data folder {cwd} holds no manifest.json",
    ),
}
USABLE = {
    "function": [*RL, "rl.reward.function=graders:score"],
    "assigned": [*RL, "rl.reward.function=graders:other"],
    "imported": [*RL, "rl.reward.function=graders:dumps"],
    "installed": [*RL, "rl.reward.function=json.encoder:py_encode_basestring"],
}
SCRIPT = """
import json, sys
from megatron_q3n.config import UserError
from megatron_q3n.recipe import configure, register_defaults
from megatron_q3n.stages.preparation import prepare, rehearse
register_defaults()
answers = {}
for name, overrides in json.load(sys.stdin).items():
    try:
        config = configure(["--config-name", "pretrain-tiny", *overrides])
        answers[name] = rehearse(config)[1] if config.dry_run else prepare(config) and None
    except UserError as error:
        answers[name] = str(error)
print(json.dumps([answers, sorted({"torch", "megatron.core", "transformers", "graders"} & set(sys.modules))]))
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str], Path]:
    """Prepare every case in one new process; return the messages, the heavy imports, and the working folder."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "prompts.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    code = "from json import dumps\ntry:\n    def score(answer, arguments): ...\nfinally:\n    other = score\n"
    (folder / "graders.py").write_text(f"{code}raise RuntimeError('imported')\n")
    (folder / "broken.py").write_text("def score(:\n")
    cases = {f"missing {name}": overrides for name, (overrides, _) in MISSING.items()}
    cases |= {f"planned {name}": [*overrides, "dry_run=true"] for name, (overrides, _) in MISSING.items()}
    for prefix, extra in (("unusable", []), ("unusable plan", ["dry_run=true"])):
        cases |= {f"{prefix} {name}": [*overrides, *extra] for name, (overrides, _) in UNUSABLE.items()}
    cases |= {f"usable {name}": overrides for name, overrides in USABLE.items()}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, check=True, cwd=folder)
    answers, heavy = json.loads(done.stdout)
    return answers, heavy, folder


@pytest.mark.parametrize("name", MISSING)
def test_missing_inputs_are_refused_by_their_setting(prepared: Any, name: str) -> None:
    answers, _, folder = prepared
    expected = MISSING[name][1].format(cwd=folder)
    assert expected in answers[f"missing {name}"]
    assert len(answers[f"missing {name}"].splitlines()) == 1
    # a plan may be for another machine
    assert any(expected in problem for problem in answers[f"planned {name}"])


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_inputs_are_refused_in_a_dry_run_too(prepared: Any, name: str) -> None:
    answers, _, folder = prepared
    for prefix in ("unusable", "unusable plan"):
        assert UNUSABLE[name][1].format(cwd=folder) in answers[f"{prefix} {name}"]
        assert len(answers[f"{prefix} {name}"].splitlines()) == 1


@pytest.mark.parametrize("name", USABLE)
def test_definitions_of_users_are_found_without_importing_them(prepared: Any, name: str) -> None:
    assert prepared[0][f"usable {name}"] is None


def test_nothing_heavy_is_imported_before_these_refusals(prepared: Any) -> None:
    assert prepared[1] == []


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with dimensions and a RoPE base that no recipe has."""
    folder = tmp_path_factory.mktemp("pretrained")
    settings = ["training.micro_batch_size=2", "training.steps=1", "validation.bigram_baseline=false", "run_dir=run"]
    model = ["model.rotary_base=3e6", "model.num_moe_experts=4", "model.megatron.moe_router_topk_scaling_factor=1.5"]
    command = ["--config-name", "pretrain-tiny", *SMALL, *settings, *model, "data.stdlib_vocab_size=600"]
    done = forked.run("megatron_q3n.train", *command, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def planned(recipe: str, *overrides: str) -> RunConfig:
    register_defaults()
    config, problems = rehearse(configure(["--config-name", recipe, *overrides]))
    assert not problems
    return config


def test_the_vocabulary_holds_the_tokenizer(pretrained: Path) -> None:
    saved = yaml.safe_load((pretrained / "config.yaml").read_text())
    assert saved["model"]["vocab_size"] == 640
    with pytest.raises(UserError, match=r"stdlib_vocab_size=600 is more than model\.vocab_size=599"):
        planned("pretrain-tiny", "data.stdlib_vocab_size=600", "model.vocab_size=599")


# settings of the model in a recipe, or in its stage part
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "sft-tiny": {},
    "sft-small": {},
    "rl-tiny": {"moe_aux_loss_coeff": 0.0},
    "mtp-tiny": {"mtp_num_layers": 4, "mtp_use_repeated_layer": True, "mtp_loss_scaling_factor": 1.0},
    "longcontext-tiny": {"rotary_base": 4e7},
    "pretrain-small": {},
}


@pytest.mark.parametrize("recipe", OWN_SETTINGS)
def test_a_stage_continues_the_checkpoints_model(pretrained: Path, recipe: str) -> None:
    """Whatever part the recipe begins with; its own settings are kept."""
    overrides = [f"checkpoint.load={pretrained}", "data.stdlib_vocab_size=600"]
    overrides += ["sft.tokenizer_vocab_size=null"] if recipe.startswith("sft") else []
    found = planned(recipe, *overrides).model.model_dump()
    expected = validate(yaml.safe_load((pretrained / "config.yaml").read_text())).model.model_dump()
    assert found == expected | OWN_SETTINGS[recipe]


def test_own_settings_are_kept_and_a_contradiction_is_refused(pretrained: Path) -> None:
    start = (f"checkpoint.load={pretrained}", "data.stdlib_vocab_size=600")
    # also one that equals the recipe's and the default
    own = planned("mtp-tiny", *start, "model.rotary_base=1e7", "model.megatron.hidden_dropout=0.1").model
    assert own.rotary_base == 1e7
    assert own.megatron == {"moe_router_topk_scaling_factor": 1.5, "hidden_dropout": 0.1}
    for override, named in (
        ("model.hidden_size=128", "hidden_size: 64 there, 128 here"),
        ("model=small", "num_layers"),
    ):
        with pytest.raises(UserError, match=rf"another architecture:.*model\.{named}"):
            planned("mtp-tiny", *start, override)


def test_continued_pretraining_with_another_tokenizer_must_be_allowed(pretrained: Path, run_module: Run) -> None:
    command = ["--config-name", "pretrain-tiny", f"checkpoint.load={pretrained}", "data.stdlib_vocab_size=500"]
    settings = [name for name in SMALL if not name.startswith("model.")]
    command += [*settings, "training.micro_batch_size=2", "training.steps=1", "validation.bigram_baseline=false"]
    refused = run_module(*command)
    assert refused.returncode == 2
    assert "(600 entries), and the text of `data` was made with" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    allowed = run_module(*command, "checkpoint.load_other_tokenizer=true")
    assert allowed.returncode == 0, allowed.stderr
