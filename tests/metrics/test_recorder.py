"""Recorder: order of records, rejected calls, messages. The wandb sink is in test_wandb_sink.py."""

import json
from pathlib import Path

import pytest

from megatron_q3n.config import RunConfig, UserError, validate
from megatron_q3n.metrics import Recorder, jsonl


def _config(interval_steps: int = 10) -> RunConfig:
    logging = {"interval_steps": interval_steps, "wandb": {"mode": "disabled"}}
    return validate({"logging": logging})


def _recorder(run_dir: Path, first_step: int = 1, *, enabled: bool = True) -> Recorder:
    return Recorder(run_dir, _config(), first_step=first_step, total_steps=8, enabled=enabled)


def test_each_step_is_one_line_with_step_time_and_values(tmp_path: Path) -> None:
    recorder = _recorder(tmp_path)
    recorder.log(1, {"tokens": 10, "loss/train": 2.0})
    recorder.log(2, {"tokens": 20, "loss/train": float("nan")})
    recorder.close("done")
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert list(first) == ["step", "time", "tokens", "loss/train"]
    assert (first["step"], first["tokens"], first["loss/train"]) == (1, 10, 2.0)
    assert second["loss/train"] is None
    assert second["time"] >= first["time"] > 1.7e9


def test_a_resume_truncates_the_records_and_logs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = _recorder(tmp_path)
    for step in range(1, 6):
        recorder.log(step, {"tokens": step, "loss/train": 1.0})
    recorder.close("stopped")
    resumed = _recorder(tmp_path, first_step=4)
    resumed.log(4, {"tokens": 4, "loss/train": 9.0})
    resumed.close("done")
    records = jsonl.read(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss/train"]) for r in records] == [(1, 1), (2, 1), (3, 1), (4, 9)]
    message = "metrics.jsonl: truncated to step 3 (2 lines removed); these steps run again"
    assert message in capsys.readouterr().out
    assert message in (tmp_path / "logs" / "events.log").read_text()


@pytest.mark.parametrize(
    ("step", "values", "complaint"),
    [
        (2, {"tokens": 1}, "step 2 logged, step 1 expected"),
        (1, {"loss/train": 1.0}, "without 'tokens'"),
        (1, {"tokens": 1, "loss/tarin": 1.0}, "'loss/tarin' has no row"),
    ],
)
def test_an_invalid_call_is_rejected_before_anything_is_written(
    tmp_path: Path, step: int, values: dict[str, float], complaint: str
) -> None:
    recorder = _recorder(tmp_path)
    with pytest.raises(AssertionError, match=complaint):
        recorder.log(step, values)
    recorder.close("failed")
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_only_the_leader_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = _recorder(tmp_path / "run", enabled=False)
    recorder.log(1, {"anything": 1.0})
    recorder.checkpointed(1)
    recorder.note("hello")
    recorder.close("done")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_notes_keep_their_time_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = _recorder(tmp_path)
    recorder.note("two\nlines")
    recorder.close("done")
    first, second = (tmp_path / "logs" / "events.log").read_text().splitlines()
    assert first.endswith("+00:00 two")
    assert second.endswith("+00:00 lines")
    assert capsys.readouterr().out == "two\nlines\n"


def test_close_twice_and_log_after_close_do_nothing(tmp_path: Path) -> None:
    recorder = _recorder(tmp_path)
    recorder.close("failed")
    recorder.close("done")
    recorder.log(1, {"tokens": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_full_disk_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events.log").symlink_to("/dev/full")
    recorder = _recorder(tmp_path)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        recorder.note("hello")
    recorder.close("failed")
