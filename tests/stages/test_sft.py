"""Fine-tuning and reinforcement learning by the command line: invalid settings, and a whole run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.config import UserError, validate
from megatron_q3n.config.rl import ALGORITHMS, RlConfig

TASK = [{"task": {"name": "chain_sum"}}]


def tree(stage: str, **sections: Any) -> dict[str, Any]:
    stage_section = {"sft": {"train": TASK}} if stage == "sft" else {"rl": {"prompts": TASK}}
    training = {"micro_batch_size": 1} | sections.pop("training", {})
    return {"stage": stage, "training": training, **stage_section, **sections}


@pytest.mark.parametrize(
    ("stage", "sections", "message"),
    [
        ("sft", {"sft": {}}, "stage=sft needs sft.train"),
        ("sft", {"training": {"micro_batch_size": 2}}, "micro_batch_size must be 1"),
        ("sft", {"data": {"mask_document_boundaries": True}}, "has no effect with stage=sft"),
        ("sft", {"sft": {"train": [{}]}}, "either {path"),
        ("sft", {"sft": {"train": [{"task": {"name": "a", "first": 0.5, "last": 0.5}}]}}, "below"),
        ("sft", {"sft": {"train": TASK, "tokenizer_vocab_size": 300}, "data": {"tokenizer": "x"}}, "replace"),
        ("sft", {"parallel": {"context_parallel_size": 2, "world_size": 2}}, "sft.alignment=1 must be"),
        ("sft", {"training": {"cuda_graph": True}}, "packs conversations"),
        ("rl", {"rl": {}}, "stage=rl needs rl.prompts"),
        ("rl", {"rl": {"prompts": [{"path": "x.jsonl"}]}}, "kind=task scores questions of task sets"),
        ("rl", {"parallel": {"context_parallel_size": 2, "world_size": 2}}, "needs whole sequences"),
        ("rl", {"parallel": {"pipeline_model_parallel_size": 2, "world_size": 2}}, "in-process engine"),
        ("rl", {"parallel": {"overlap_grad_reduce": True}}, "MTP layers get none"),
        ("rl", {"rl": {"prompts": TASK, "updates_per_rollout": 3}}, "not divisible by rl.updates_per_rollout"),
        ("rl", {"rl": {"prompts": TASK, "updates_per_rollout": 2, "max_staleness": 0}}, "max_staleness"),
        (
            "rl",
            {"rl": {"prompts": TASK, "updates_per_rollout": 2, "old_logprobs_interval_rollouts": 5}},
            "set one of them to 1",
        ),
        (
            "rl",
            {"training": {"steps": 1600}, "rl": {"prompts": TASK, "updates_per_rollout": 16}},
            "interval_steps=200 is not",
        ),
        ("rl", {"rl": {"prompts": TASK, "rollout": {"max_new_tokens": 256}}}, "row that holds a prompt"),
        ("rl", {"rl": {"prompts": TASK, "rollout": {"engine": "http"}}}, "needs at least one"),
        ("rl", {"rl": {"prompts": TASK, "rollout": {"urls": ["http://x/v1"]}}}, "in_process none"),
        ("rl", {"rl": {"prompts": TASK, "rollout": {"engine": "http", "urls": ["x"]}}}, "does not carry routes"),
        (
            "rl",
            {"rl": {"prompts": TASK, "rollout": {"engine": "http", "urls": ["x"], "temperature": 0.5}}},
            "set it to 1",
        ),
        ("rl", {"rl": {"prompts": TASK, "reward": {"kind": "function"}}}, "needs module:name"),
        ("rl", {"rl": {"prompts": TASK, "reward": {"kind": "function", "function": "a.b"}}}, "write it as"),
        ("rl", {"rl": {"prompts": TASK, "reward": {"answer_pattern": "("}}}, "answer_pattern"),
        ("rl", {"rl": {"prompts": TASK, "reward": {"answer_pattern": "a"}}}, "has no group"),
        ("rl", {"rl": {"prompts": TASK, "overlong_buffer_tokens": 64}}, "must be below"),
    ],
)
def test_invalid_settings_are_refused(stage: str, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace("{", r"\{")):
        validate(tree(stage, **sections))


def test_an_algorithm_is_its_rules_with_overrides() -> None:
    for name, rules in ALGORITHMS.items():
        assert RlConfig(algorithm=name).rules == rules  # type: ignore[arg-type]
    mixed = RlConfig(algorithm="grpo", normalisation="token", clip_high=0.28)
    assert (mixed.rules.normalisation, mixed.rules.clip_high, mixed.rules.clip_low) == ("token", 0.28, 0.2)
    assert [RlConfig(algorithm=a).resamples_zero_variance_groups for a in ("gspo", "dapo")] == [False, True]


@pytest.mark.slow
def test_a_run_from_conversations_to_text(tmp_path: Path, run_module: Any) -> None:
    """Overfit one answer, resume, and generate from the checkpoint with the run's own tokenizer."""
    conversations = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "seven"}]}
        for n in range(40)
    ]
    (tmp_path / "conversations.jsonl").write_text("".join(json.dumps(c) + "\n" for c in conversations[:25]))
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(c) + "\n" for c in conversations[25:]))
    settings = [
        "sft.train=[{path: conversations.jsonl}, {path: more.jsonl}]",
        "sft.validation_percent=20",
        "sft.chat_template=null",
        "sft.tokenizer_vocab_size=280",
        "training.sequence_length=64",
        "training.global_batch_size=2",
        "schedule.warmup_steps=2",
        "logging.wandb.mode=disabled",
        "run_dir=first",
    ]
    done = run_module("--config-name", "sft-tiny", "training.steps=60", *settings)
    assert done.returncode == 0, done.stderr
    records = [json.loads(x) for x in (tmp_path / "first/metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss/train"] == pytest.approx(math.log(512), abs=0.8)
    assert records[-1]["loss/validation"] < 0.3
    assert {name for name in records[-1] if name.startswith("loss/validation/")} == {
        "loss/validation/conversations",
        "loss/validation/more",
    }
    log = (tmp_path / "first/logs/events.log").read_text()
    assert "held out, 20 % of sft.train; " in log
    assert "⟦seven<|endoftext|>⟧" in log
    prompt = ['inference.prompts=["user:\\nsay 3"]', "inference.max_new_tokens=20"]
    text = run_module("--config-name", "generate", "checkpoint.load=first", *prompt)
    assert text.returncode == 0, text.stderr
    more = run_module("--resume", "first", "training.steps=62")
    assert more.returncode == 0, more.stderr
    other = run_module("--resume", "first", "training.steps=64", "sft.turns=last")
    assert other.returncode == 2
    assert "sft.turns: all there, last here" in other.stderr
