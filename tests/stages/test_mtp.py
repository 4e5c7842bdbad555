"""Stage mtp from a checkpoint with one depth: trunk unchanged bit for bit, MTP layer trained, acceptance reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_q3n.config import validate

MODEL = {"hidden_size": 32, "max_position_embeddings": 512}
SMALL = [
    "model.hidden_size=32",
    "model.max_position_embeddings=512",
    "training.steps=3",
    "training.sequence_length=64",
    "schedule.warmup_steps=1",
    "validation.batches=1",
    "samples.count=0",
    "logging.wandb.mode=disabled",
]


@pytest.fixture(scope="module")
def start(alone: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose model has one MTP layer that is not repeated."""
    from megatron_q3n import checkpoint
    from megatron_q3n.training.state import build_state

    folder = tmp_path_factory.mktemp("start")
    config = validate({"model": MODEL, "training": {"sequence_length": 64}})
    checkpoint.save(build_state(config, *alone), folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return folder


def weights(alone: Any, run_dir: Path) -> dict[str, torch.Tensor]:
    """Load a checkpoint's parameters by name."""
    from megatron_q3n import checkpoint
    from megatron_q3n.checkpoint.weights import load_weights
    from megatron_q3n.model.build import build_model

    config = validate({"model": MODEL, "training": {"sequence_length": 64}})
    device, group = alone
    model = build_model(config, device.model_backend, group.groups)[0]
    load_weights([model], config, group, checkpoint.find(str(run_dir)))
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_text(alone: Any, start: Path, tmp_path: Path, run_module: Callable[..., Any]) -> None:
    run_dir = tmp_path / "run"
    done = run_module("--config-name", "mtp-tiny", f"checkpoint.load={start}", f"run_dir={run_dir}", *SMALL)
    assert done.returncode == 0, done.stderr
    before, after = weights(alone, start), weights(alone, run_dir)
    for name in before:
        same = torch.equal(before[name], after[name])
        assert same != name.startswith("mtp.") or "norm" in name, name
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["grad_norm"] > 0
    assert {f"loss/mtp_{depth}" for depth in range(1, 5)} <= set(last)
    assert 1 <= last["acceptance_length/greedy"] <= 5
    assert 0 < last["acceptance_rate/sampled_1"] < 1
    assert "Draft acceptance rate, sampled" in (run_dir / "report.html").read_text()


def test_conversations(start: Path, tmp_path: Path, run_module: Callable[..., Any]) -> None:
    """Train the MTP layer again after fine-tuning or reinforcement learning."""
    path = tmp_path / "conversations.jsonl"
    conversations = [
        [{"role": "user", "content": f"{n} + 1 ="}, {"role": "assistant", "content": f"{n + 1}"}] for n in range(60)
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    run_dir = tmp_path / "run"
    done = run_module(
        "--config-name",
        "mtp-tiny",
        f"checkpoint.load={start}",
        f"run_dir={run_dir}",
        *SMALL,
        "training.micro_batch_size=1",
        f"sft.train=[{{path: {path}}}]",
    )
    assert done.returncode == 0, done.stderr
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss/mtp_1"] > 0
    assert "acceptance_length/greedy" in last
