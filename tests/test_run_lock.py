"""The lock of a run directory between real processes, and owners on other machines as their files show them.

Another machine is a file with the boot id of another one: whether locks hold between machines is not covered. The test
process must not open the lock file while it holds the lock (megatron_q3n/run_lock.py says why).
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.config import RunInUseError, UserError
from megatron_q3n.run_lock import LOCK_FILE, LockTimes, Owner, RunLock

FAST = LockTimes(renewal=0.04, silent=0.4, lease=0.8)


def hold(run_dir: Path, ready: Any) -> None:
    """Lock the directory, start a child that outlives this process, and wait to be killed."""
    RunLock(run_dir, FAST).acquire()
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    ready.put(child)
    time.sleep(60)


def write_owner(run_dir: Path, owner: Owner, renewals: int = 0) -> None:
    path = run_dir / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**asdict(owner), "renewals": renewals}))


ELSEWHERE = replace(Owner.this_process(), machine="another boot id", host="node7", pid=99)


def test_a_live_owner_refuses_and_a_killed_one_does_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Queue()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    child = ready.get(timeout=30)
    try:
        with pytest.raises(RunInUseError, match=rf"in use by process {process.pid} on .*Nothing was changed"):
            RunLock(tmp_path, FAST).acquire()
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        # the child of the killed process is alive and has its file handles
        os.kill(child, 0)
        lock = RunLock(tmp_path, FAST)
        note = lock.acquire()
        assert note
        assert f"left by process {process.pid}" in note
        lock.release()
        assert RunLock(tmp_path, FAST).acquire() is None, "released, so no owner is named"
    finally:
        os.kill(child, signal.SIGKILL)


def test_an_owner_on_another_machine_is_used_until_it_is_silent(tmp_path: Path) -> None:
    write_owner(tmp_path, ELSEWHERE)
    stop = threading.Event()

    def renew() -> None:
        number = 0
        while not stop.wait(FAST.renewal):
            number += 1
            write_owner(tmp_path, ELSEWHERE, number)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(RunInUseError, match="in use by process 99 on node7"):
            RunLock(tmp_path, FAST).acquire()
    finally:
        stop.set()
        thread.join()
    began = time.monotonic()
    lock = RunLock(tmp_path, FAST)
    assert "left by process 99 on node7" in (lock.acquire() or "")
    assert time.monotonic() - began >= FAST.silent
    lock.release()


def test_a_requeued_job_goes_on_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_owner(tmp_path, replace(ELSEWHERE, job="12", job_restarts=0))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock = RunLock(tmp_path, replace(FAST, silent=1000.0))
    assert "of Slurm job 12 on node7" in (lock.acquire() or "")
    lock.release()


def test_a_lost_machine_whose_lock_stays_is_named_with_what_to_do(tmp_path: Path) -> None:
    """As on NFS: the lock is held, and the owner is silent and elsewhere."""
    context = multiprocessing.get_context("fork")
    ready = context.Queue()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    child = ready.get(timeout=30)
    try:
        assert process.pid
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2 * FAST.renewal)
        write_owner(tmp_path, ELSEWHERE)
        with pytest.raises(RunInUseError, match=rf"if it no longer exists, delete .*{LOCK_FILE}"):
            RunLock(tmp_path, FAST).acquire()
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("content", [b"", b"\x00" * 600, b"{", b"[]", b'{"pid": 1}', b'"text"'])
def test_a_damaged_file_names_no_owner(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / LOCK_FILE).write_bytes(content)
    lock = RunLock(tmp_path, FAST)
    assert lock.acquire() is None
    lock.release()


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written.*run_dir="):
        RunLock(tmp_path, FAST).acquire()
