"""Bad batches in a real run of one process, without Slurm: the result of each policy.

The faults come from tests/slurm/faults. Other layouts: tests/slurm/test_trouble.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.runs import FAULTS, ROOT, SMALL, numbers

ARGUMENTS = ["--config-name", "pretrain-tiny", *SMALL]


def train(run_dir: Path, fault: str, *settings: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(FAULTS), os.environ["PYTHONPATH"]))
    return subprocess.run(
        [sys.executable, "-m", "megatron_q3n.train", *ARGUMENTS, f"run_dir={run_dir}", *settings],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "Q3N_FAULT": fault},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_a_roll_back_is_the_run_without_that_batch(tmp_path: Path) -> None:
    """Bit for bit: after the roll-back the run continues as if the batch had never existed."""
    bad, clean = tmp_path / "bad", tmp_path / "clean"
    done = train(bad, "nan@5", "health.non_finite=roll_back")
    assert done.returncode == 0, done.stderr
    assert "leaving out batch 5" in done.stdout
    clean.mkdir()
    shutil.copy(bad / "skipped_batches.json", clean)
    assert train(clean, "", "health.non_finite=roll_back").returncode == 0
    assert numbers(bad) == numbers(clean)


def test_a_withheld_update_is_counted_and_the_run_ends_well(tmp_path: Path) -> None:
    done = train(tmp_path / "run", "spike@8", "health.loss_spike=skip", "health.spike_min_steps=5")
    assert done.returncode == 0, done.stderr
    assert "step 9: loss" in done.stdout
    assert "update withheld (health.loss_spike=skip)" in done.stdout
    records = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r.get("skipped_steps", 0) for r in records] == [0] * 8 + [1] * 4
    before, after = records[7]["loss/train"], records[9]["loss/train"]
    assert after == pytest.approx(before, abs=0.3), "the weights did not see the batch"


@pytest.mark.slow
def test_stop_keeps_the_checkpoint_and_prints_how_to_continue(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = train(run_dir, "nan@5", "health.non_finite=stop")
    assert done.returncode == 2
    assert done.stderr.count("error: step 6: loss nan") == 1
    assert "Traceback" not in done.stderr
    assert (run_dir / "checkpoints/latest").resolve().name == "step_0000004"
    outcome = json.loads((run_dir / "logs/outcome.json").read_text())
    assert outcome["code"] == 2
    assert "health.non_finite=skip" in outcome["message"]
