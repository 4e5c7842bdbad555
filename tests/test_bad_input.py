"""Bad input: one message with the place, the value and what is allowed, and exit code 2.

Bad settings are refused before torch is imported. Refusals of data preparation are tested in tests/data, those of
checkpoints in tests/checkpoint.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SETTINGS: dict[str, tuple[list[str], str]] = {
    "misspelt setting": (["training.stesp=3"], "training.stesp: no such setting. Did you mean 'training.steps'?"),
    "right leaf, wrong parent": (["optimizer.lr=1"], "Did you mean 'schedule.lr'?"),
    "misspelt part": (["model=smal"], "model=smal: there is no recipes/model/smal.yaml. Did you mean 'small'?"),
    "wrong type": (["training.steps=many"], "training.steps='many': input should be a valid integer"),
    "not a number": (["schedule.lr=fast"], "schedule.lr='fast'"),
    "neither steps nor a share": (["schedule.decay_steps=1.5"], "schedule.decay_steps=1.5 is neither"),
    "negative": (["training.steps=-1"], "training.steps=-1: input should be greater than 0"),
    "no value": (["training.steps"], "training.steps"),
    "heads by tensor parallel": (
        ["parallel.tensor_model_parallel_size=3", "parallel.world_size=3"],
        "model.num_attention_heads=4 is not divisible by parallel.tensor_model_parallel_size=3",
    ),
    "experts by expert parallel": (
        ["parallel.expert_model_parallel_size=3", "parallel.world_size=3"],
        "model.num_moe_experts=8 is not divisible by parallel.expert_model_parallel_size=3",
    ),
    "sequence by context parallel": (
        ["parallel.context_parallel_size=2", "parallel.world_size=2", "training.sequence_length=254"],
        "training.sequence_length=254 is not divisible by 2 × parallel.context_parallel_size=2",
    ),
    "world by layout": (
        ["parallel.pipeline_model_parallel_size=2", "parallel.world_size=3"],
        "the world size=3 is not divisible by",
    ),
    "batch by data parallel": (
        ["parallel.world_size=3"],
        "training.global_batch_size=4 is not divisible by training.micro_batch_size=4 × data parallel size 3",
    ),
    "unknown megatron option": (["model.megatron.moe_router_dtyp=fp32"], "Did you mean 'moe_router_dtype'?"),
    "owned megatron option": (["model.megatron.hidden_size=3"], "set model.hidden_size instead"),
    "wrongly typed megatron option": (["model.megatron.moe_permute_fusion=7"], "declares this field as bool"),
    "vocabulary too small": (["model.vocab_size=300"], "data.stdlib_vocab_size=512 is more than model.vocab_size=300"),
    "setting without effect": (["training.recompute_modules=[moe]"], "only with recompute_granularity=selective"),
    "fp8 with an odd width": (
        ["precision.compute=bf16", "precision.fp8=hybrid", "model.moe_shared_expert_intermediate_size=40"],
        "multiples of 16",
    ),
    "a graph of a packed run": (
        ["training.cuda_graph=true", "data.mask_document_boundaries=true", "training.micro_batch_size=1"],
        "training.cuda_graph=true: data.mask_document_boundaries=true",
    ),
    "fp8 without bf16": (["precision.fp8=hybrid"], "precision.fp8=hybrid needs precision.compute=bf16"),
}


@pytest.fixture(scope="module")
def refusals() -> dict[str, Any]:
    """Configure with each bad setting, in one new process; return the messages, the times, and the heavy imports."""
    script = (
        "import json, sys, time\n"
        "from megatron_q3n.config import UserError\n"
        "from megatron_q3n.recipe import configure, register_defaults\n"
        "register_defaults()\n"
        "answers = {}\n"
        "for name, settings in json.load(sys.stdin).items():\n"
        "    began = time.perf_counter()\n"
        "    try:\n"
        "        configure(['--config-name', 'pretrain-tiny', *settings])\n"
        "        message = None\n"
        "    except UserError as error:\n"
        "        message = str(error)\n"
        "    answers[name] = [message, time.perf_counter() - began]\n"
        "heavy = sorted({'torch', 'megatron.core', 'transformers'} & set(sys.modules))\n"
        "print(json.dumps({'answers': answers, 'heavy': heavy}))\n"
    )
    cases = {name: settings for name, (settings, _) in SETTINGS.items()}
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SETTINGS)
def test_bad_settings_are_named(refusals: dict[str, Any], name: str) -> None:
    message, _ = refusals["answers"][name]
    assert message is not None, "accepted"
    assert SETTINGS[name][1] in message
    assert len(message.splitlines()) == 1


def test_no_heavy_import_happens_before_a_refusal(refusals: dict[str, Any]) -> None:
    assert refusals["heavy"] == []


def test_the_command_line_answers_in_one_line_and_exit_code_2(run_module: Callable[..., Any]) -> None:
    began = time.monotonic()
    done = run_module("--config-name", "pretrain-tiny", "training.stesp=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"error: {SETTINGS['misspelt setting'][1]} config.yaml of any run lists them all."
    ]
    # two seconds on an idle machine; this only excludes a heavy import
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-name", "pretrain-tiy"], "no such recipe. Did you mean 'pretrain-tiny'?"),
        (["--resume", "."], "not a run directory"),
        (["--config-name", "longcontext-tiny"], "checkpoint.load=RUN_DIR"),
    ],
)
def test_bad_starts_are_refused(run_module: Callable[..., Any], arguments: list[str], message: str) -> None:
    done = run_module(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_data_and_checkpoint_are_refused_before_anything_is_written(
    run_module: Callable[..., Any], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for settings, message in (
        (["data=blend"], "corpora/train"),
        ([f"checkpoint.load={tmp_path / 'nothing'}"], "no checkpoint found"),
    ):
        done = run_module("--config-name", "pretrain-tiny", f"run_dir={run_dir}", *settings)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not run_dir.exists()


def test_a_read_only_disk_is_refused(run_module: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a read-only disk")
    try:
        done = run_module("--config-name", "pretrain-tiny", f"runs_dir={folder}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
