"""Asynchronous saves: the checkpoint holds the state at the call, and exists only when complete.

Whole runs with it, and SIGTERM during one: tests/stages/test_resume.py (asynchronous is the default). A GPU is not
covered.
"""

import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.checkpoint import integrity, newest_in
from megatron_q3n.config import UserError
from tests.checkpoint.tiny_state import fingerprint, state_of, step

ASYNCHRONOUS = {"checkpoint": {"asynchronous": True}}
SYNCHRONOUS = {"checkpoint": {"asynchronous": False}}


@pytest.fixture
def gate(alone: Any, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Block the writing thread until the event is set, like a very slow disk."""
    from megatron_q3n.checkpoint import writer

    event, write = threading.Event(), writer._write

    def blocked_write(*arguments: Any) -> None:
        assert event.wait(60)
        write(*arguments)

    monkeypatch.setattr(writer, "_write", blocked_write)
    return event


def test_steps_taken_before_the_write_do_not_reach_the_checkpoint(
    alone: Any, tmp_path: Path, gate: threading.Event
) -> None:
    from megatron_q3n import checkpoint

    state = state_of(alone, ASYNCHRONOUS)
    for _ in range(2):
        step(state)
    saved = fingerprint(state)
    saver = checkpoint.Saver(state, tmp_path)
    path = saver.save()
    expected = [step(state) for _ in range(3)]
    assert saver.wait_for_save(False) == []
    assert newest_in(tmp_path) is None
    gate.set()
    assert saver.wait_for_save(True) == [2]
    assert newest_in(tmp_path) == path
    resumed = state_of(alone)
    checkpoint.resume(resumed, tmp_path)
    assert fingerprint(resumed) == saved
    assert [step(resumed) for _ in range(3)] == expected


def test_synchronous_and_asynchronous_saves_write_the_same_bytes(alone: Any, tmp_path: Path) -> None:
    from megatron_q3n import checkpoint, parallel

    written = []
    for name, settings in (("a", ASYNCHRONOUS), ("b", SYNCHRONOUS)):
        parallel.seed(1)
        state = state_of(alone, settings)
        step(state)
        path = checkpoint.save(state, tmp_path / name)
        written.append(integrity.read_manifest(path)["digests"]["__0_0.distcp"])
    assert written[0] == written[1]


def test_a_second_save_and_the_end_wait_for_the_first(alone: Any, tmp_path: Path, gate: threading.Event) -> None:
    from megatron_q3n import checkpoint

    state = state_of(alone, ASYNCHRONOUS)
    saver = checkpoint.Saver(state, tmp_path)
    step(state)
    saver.save()
    step(state)
    threading.Timer(0.3, gate.set).start()
    saver.save()
    assert gate.is_set()
    assert saver.wait_for_save(True) == [1, 2]
    assert saver.wait_for_save(True) == []


def test_a_failed_background_write_is_raised_by_wait_for_save(
    alone: Any, tmp_path: Path, gate: threading.Event
) -> None:
    from megatron_q3n import checkpoint

    state = state_of(alone, ASYNCHRONOUS)
    saver = checkpoint.Saver(state, tmp_path)
    step(state)
    gate.set()
    good = saver.save()
    saver.wait_for_save(True)
    gate.clear()
    step(state)
    saver.save()
    (partial,) = (tmp_path / "checkpoints").glob(".*.partial")
    # the write fails: its folder does not exist
    partial.rename(tmp_path / "gone")
    gate.set()
    with pytest.raises(UserError, match=r"could not be written.*last good checkpoint is .*0000001"):
        saver.wait_for_save(True)
    assert newest_in(tmp_path) == good
