"""megatron_q3n.train under torchrun: two processes give the losses of one; a wrong setting gives one message.

Parallel layouts are tested in tests/tools/layouts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked

TRAIN = "megatron_q3n.train"
pytestmark = pytest.mark.multiprocess
SETTINGS = [
    "--config-name",
    "pretrain-tiny",
    "training.steps=4",
    "training.sequence_length=64",
    "training.micro_batch_size=2",
    "schedule.warmup_steps=1",
    "validation.batches=1",
    "validation.bigram_baseline=false",
    "validation.interval_steps=2",
    "samples.count=1",
    "logging.wandb.mode=disabled",
]


def run(processes: int, *settings: str) -> subprocess.CompletedProcess[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *launcher, TRAIN, *SETTINGS, *settings]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=240, check=False)


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    losses = []
    for name in ("one", "two"):
        run_dir = tmp_path / name
        setting = f"run_dir={run_dir}"
        done = run(2, setting) if name == "two" else forked.run(TRAIN, *SETTINGS, setting)
        assert done.returncode == 0, done.stderr[-3000:]
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        losses.append([r[k] for r in records for k in ("loss/train", "grad_norm", "loss/validation") if k in r])
        assert (run_dir / "report.html").is_file()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_wrong_setting_is_reported_once(tmp_path: Path) -> None:
    done = run(2, "training.stesp=3", f"run_dir={tmp_path / 'run'}")
    assert done.returncode != 0
    assert done.stderr.count("training.stesp: no such setting") == 1
    assert not (tmp_path / "run").exists()
