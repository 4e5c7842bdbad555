"""Runs on disks that are full at different moments: one message, exit 2 so that Slurm does not retry, and an outcome.

The save of a checkpoint on a full disk: tests/checkpoint/test_checkpoint.py.
"""

import errno
import json
from pathlib import Path

import pytest

from megatron_q3n.run_directory import full_disk_error, record_outcome
from tests import forked
from tests.small_disk import small_disk
from tests.stages.test_session import ALL, RUNS

TRAIN = "megatron_q3n.train"
ARGUMENTS = [*RUNS["pretrain"], *ALL, "logging.wandb.mode=offline"]


# what does not fit: config.yaml, logs/weight_decay.txt or environment.json, metrics.jsonl, the checkpoint
@pytest.mark.parametrize("kib", [16, 24, 60, 200])
def test_a_full_disk_ends_with_one_message_and_an_outcome(tmp_path: Path, kib: int) -> None:
    with small_disk(tmp_path / "disk", kib) as disk:
        done = forked.run(TRAIN, *ARGUMENTS, f"run_dir={disk / 'run'}")
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        (message,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert str(disk) in message
        outcome = json.loads((disk / "run/logs/outcome.json").read_text())
        assert outcome["code"] == 2
        assert outcome["message"] == message.removeprefix("error: ")


def test_a_report_that_cannot_be_written_changes_neither_code_nor_message(tmp_path: Path) -> None:
    """The report is first written beside its final name."""
    run_dir = tmp_path / "run"
    (run_dir / "report.html.new").mkdir(parents=True)
    stopping = "callbacks=[{path: tests.stages.session_callbacks.ScaledGradients, arguments: {step: 3, factor: nan}}]"
    failed = forked.run(TRAIN, *ARGUMENTS, "health.non_finite=stop", stopping, f"run_dir={run_dir}")
    assert failed.returncode == 2
    assert "error: step 3: loss nan" in failed.stderr
    assert "warning: " in failed.stderr
    assert "report.html.new" in failed.stderr
    assert "Traceback" not in failed.stderr
    done = forked.run(TRAIN, "--resume", run_dir, "callbacks=[]")
    assert done.returncode == 0, done.stderr
    assert "report.html.new" in done.stderr
    assert json.loads((run_dir / "logs/outcome.json").read_text())["code"] == 0


def test_an_outcome_is_replaced_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    path = tmp_path / "logs/outcome.json"
    record_outcome(tmp_path, 2, "ü" * 10_000)
    size, inode = path.stat().st_size, path.stat().st_ino
    record_outcome(tmp_path, 0)
    assert json.loads(path.read_text()) | {"time": 0} == {"code": 0, "message": "", "time": 0}
    assert (path.stat().st_size, path.stat().st_ino) == (size, inode)


def test_only_a_full_or_read_only_disk_counts_as_one() -> None:
    refusal = full_disk_error(Path("run"), OSError(errno.ENOSPC, "No space left on device", "a/file"))
    assert "a/file" in str(refusal)
    assert full_disk_error(Path("run"), OSError(errno.ECONNRESET, "Connection reset by peer")) is None
