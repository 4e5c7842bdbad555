"""A run and its directory by the command line: changed data on resume, and what a refused run leaves behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
