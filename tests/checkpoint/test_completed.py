"""Checkpoints that are gone are not taken for none yet, and those that may not be read not for damaged ones.

Whole runs: tests/stages/test_refused_resume.py.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.checkpoint import check_not_lost, completed, find, folders, integrity, newest_in
from megatron_q3n.config import UserError
from tests.checkpoint.tiny_state import fingerprint, state_of, step
from tests.checkpoint.unprivileged import public_folder, unprivileged


@pytest.fixture(scope="module")
def saved(alone: Any) -> Iterator[tuple[Path, Any]]:
    """Return a run with the checkpoints of steps 1 and 2, in a folder that every user can read, and its state."""
    from megatron_q3n import checkpoint

    with public_folder() as folder:
        state = state_of(alone)
        for _ in range(2):
            step(state)
            checkpoint.save(state, folder / "run")
        yield folder / "run", state


def fake_checkpoint(run_dir: Path, number: int) -> None:
    folder = run_dir / folders.FOLDER / folders.step_name(number)
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"data")
    integrity.write_manifest(folder, {"step": number, "world_size": 1, "model": {}})


def with_record(run_dir: Path) -> None:
    completed.record(run_dir, run_dir / "checkpoints/step_0000004")


def with_summary(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text("{}")


def with_many_steps(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("checkpoint: {interval_steps: 4}")
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, 10)) + '{"st')


@pytest.mark.parametrize("evidence", [with_record, with_summary, with_many_steps])
def test_lost_checkpoints_are_noticed(tmp_path: Path, evidence: Any) -> None:
    evidence(tmp_path)
    with pytest.raises(UserError, match=r"has no checkpoint\. Nothing was changed"):
        check_not_lost(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"a link to .*elsewhere, has no checkpoint"):
        check_not_lost(tmp_path)
    fake_checkpoint(tmp_path, 4)
    check_not_lost(tmp_path)


def test_a_run_without_a_complete_checkpoint_may_begin_again(tmp_path: Path) -> None:
    with_many_steps(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n')
    (tmp_path / "checkpoints/.step_0000004.token.partial").mkdir(parents=True)
    check_not_lost(tmp_path)


def test_a_link_to_a_missing_folder_is_refused_even_without_a_record(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "missing")
    for function in (check_not_lost, newest_in, find):
        with pytest.raises(UserError, match=r"a link to .*missing, which does not exist: mount its disk"):
            function(tmp_path)


def test_a_save_and_a_resume_write_the_record(saved: tuple[Path, Any], alone: Any, tmp_path: Path) -> None:
    from megatron_q3n import checkpoint

    run_dir, _ = saved
    assert json.loads((run_dir / completed.RECORD).read_text())["step"] == 2
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy, symlinks=True)
    (copy / completed.RECORD).unlink()
    state = state_of(alone)
    assert checkpoint.resume(state, copy).notes == []
    assert json.loads((copy / completed.RECORD).read_text())["step"] == 2
    shutil.rmtree(copy / "checkpoints/step_0000002")
    (note,) = checkpoint.resume(state, copy).notes
    assert "step 2 is recorded" in note
    assert "going back to step_0000001" in note
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="the checkpoint of step 1 was complete"):
        checkpoint.resume(state, copy)


@pytest.mark.parametrize("victim", ["checkpoints", "step_0000002", "checkpoint.json", ".metadata"])
def test_a_checkpoint_that_may_not_be_read_is_not_damaged(saved: tuple[Path, Any], victim: str) -> None:
    from megatron_q3n import checkpoint

    run_dir, state = saved
    newest = run_dir / "checkpoints/step_0000002"
    path = {"checkpoints": newest.parent, "step_0000002": newest}.get(victim, newest / victim)
    before, mode = fingerprint(state), path.stat().st_mode
    path.chmod(0)
    try:
        with unprivileged(), pytest.raises(UserError, match=r"cannot be read.*Permission denied") as caught:
            checkpoint.resume(state, run_dir)
    finally:
        path.chmod(mode)
    assert "is damaged" not in str(caught.value)
    assert fingerprint(state) == before
    assert sorted(path.name for path in newest.parent.glob("step_*")) == ["step_0000001", "step_0000002"]


def test_an_unreadable_older_checkpoint_is_neither_renamed_nor_a_reason_to_fail(
    saved: tuple[Path, Any], alone: Any, tmp_path: Path
) -> None:
    """The saver verifies it before it prunes; the new checkpoint is complete and nothing is deleted."""
    from megatron_q3n import checkpoint

    with public_folder() as folder:
        run_dir = folder / "run"
        shutil.copytree(saved[0], run_dir, symlinks=True)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o777)
        state = state_of(alone)
        checkpoint.load(state, run_dir / "checkpoints/step_0000002", resume=True)
        step(state)
        (run_dir / "checkpoints/step_0000002/.metadata").chmod(0)
        notes: list[str] = []
        with unprivileged():
            saver = checkpoint.Saver(state, run_dir, notes.append)
            saver.save()
            assert saver.wait_for_save(True) == [3]
        assert "cannot be read" in notes[0]
        assert "No older checkpoint is deleted" in notes[0]
        assert sorted(path.name for path in (run_dir / "checkpoints").glob("step_*")) == [
            *("step_0000001", "step_0000002", "step_0000003")
        ]
