"""tools/convert_hf.py as a user runs it: exit codes, messages, and one override that trains from an import."""

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_q3n.config import ModelConfig
from tests import forked
from tests.hf.published import publish, stored, transformers_model
from tests.model.reference.test_model import move_from_init, published_config, qwen3_next

TOOL = Path(__file__).parent.parent.parent / "tools" / "convert_hf.py"


def convert(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return forked.run(TOOL, *arguments)


def test_continued_pretraining_takes_one_override(
    run_module: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """A published model of the tiny recipe's dimensions: in, three steps, out, and near where it was."""
    model = qwen3_next().Qwen3NextForCausalLM(published_config(ModelConfig()))
    move_from_init(model)
    source = publish(tmp_path / "hf", model)
    imported = convert("import", source, "--output", tmp_path / "ours")
    assert imported.returncode == 0, imported.stderr
    override = f"checkpoint.load={tmp_path / 'ours'}"
    assert f"  {override}\n" in imported.stdout
    short = [
        *("training.steps=3", "training.global_batch_size=2", "training.micro_batch_size=2"),
        *("training.sequence_length=64", "schedule.warmup_steps=0", "run_dir=run"),
        *("validation.batches=1", "validation.bigram_baseline=false", "samples.count=0"),
        *("schedule.lr=1e-4", "schedule.min_lr=1e-4"),
    ]
    refused = run_module("--config-name", "pretrain-tiny", override, *short)
    assert refused.returncode == 2
    assert "does not say which tokenizer it was trained with" in refused.stderr
    short.append("checkpoint.load_other_tokenizer=true")
    trained = run_module("--config-name", "pretrain-tiny", override, *short)
    assert trained.returncode == 0, trained.stderr
    assert "weights from" in trained.stdout
    exported = convert("export", tmp_path / "run", "--output", tmp_path / "out", "--dtype", "fp32", "--like", source)
    assert exported.returncode == 0, exported.stderr
    assert re.search(r"Qwen3NextForCausalLM, from .*step_0000003", exported.stdout)
    before, after = stored(source), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-3, atol=1e-3)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > len(before) / 2


def test_the_imported_model_is_a_recipe_part(tmp_path: Path) -> None:
    from megatron_q3n.recipe import configure, register_defaults  # late: Hydra, for this test alone

    register_defaults()

    source = publish(tmp_path / "hf", transformers_model("qwen3_5_moe_text"))
    imported = convert("import", source, "--output", tmp_path / "ours")
    line = next(line for line in imported.stdout.splitlines() if "--config-dir" in line)
    arguments = line.split("megatron_q3n.train ")[1].split()
    data = ["data=blend", "data.train=[{path: unused}]"]
    model = configure([*arguments, *data]).model
    assert (model.vocab_size, model.linear_value_head_dim, model.rotary_base) == (96, 12, 1e6)
    assert model.mixer_pattern == "GGG*"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "nowhere", "--output", "x"], "nowhere has neither model.safetensors.index.json"),
        (["export", "nowhere", "--output", "x"], "nowhere: no checkpoint found"),
        (["export", ".", "--output", "x", "--model-type", "gpt2"], "model_type='gpt2' is not supported"),
        (["export", ".", "--output", "x", "--max-shard-size", "4 apples"], "'4 apples' is not a size"),
        (["export", "."], "the following arguments are required: --output"),
    ],
)
def test_bad_input_exits_with_2_and_one_message(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, but for the exit itself, which argparse makes."""
    tool = runpy.run_path(str(TOOL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
    try:
        code = tool["main"]()
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2
    assert message in shown.err
    assert shown.out == ""


def test_a_damaged_source_exits_with_2(tmp_path: Path) -> None:
    source = publish(tmp_path / "hf", transformers_model("qwen3_next"))
    (source / "mtp.safetensors").write_bytes(b"")
    done = convert("import", source, "--output", tmp_path / "ours")
    assert done.returncode == 2
    assert done.stderr.startswith(f"convert_hf.py: {source}/mtp.safetensors is truncated or damaged")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
