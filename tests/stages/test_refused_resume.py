"""Resumes that must be refused with exit 2, without a changed byte: lost checkpoints, and a directory in use.

Which files and folders count as lost: tests/checkpoint/test_completed.py; the lock: tests/test_run_lock.py.
"""

import shutil
from pathlib import Path

import pytest

from megatron_q3n.run_lock import LOCK_FILE, RunLock
from tests import forked
from tests.stages.test_session import ALL, RUNS

TRAIN = "megatron_q3n.train"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run directory with checkpoints."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    done = forked.run(TRAIN, *RUNS["pretrain"], *ALL, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


def contents(run_dir: Path) -> dict[str, bytes]:
    """Return every file but the lock, which this process must not open while it holds it, and the outcome."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and not path.is_symlink()]
    names = {str(path.relative_to(run_dir)): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if name != LOCK_FILE}


def test_lost_checkpoints_are_refused_and_metrics_stay(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, symlinks=True)
    (run_dir / "checkpoints").rename(tmp_path / "disk")
    (run_dir / "checkpoints").symlink_to(tmp_path / "unmounted")
    before = contents(run_dir)
    for _ in range(2):
        refused = forked.run(TRAIN, "--resume", run_dir, "training.steps=5")
        assert refused.returncode == 2, refused.stderr
        assert "error: " in refused.stderr
        assert "unmounted" in refused.stderr
        assert "Traceback" not in refused.stderr
        after = contents(run_dir)
        assert after.keys() - before.keys() <= {"logs/outcome.json"}
        assert {name: after[name] for name in before if name != "logs/outcome.json"} == {
            name: content for name, content in before.items() if name != "logs/outcome.json"
        }
        # and next, the mount point is there and empty
        (tmp_path / "unmounted").mkdir(exist_ok=True)
    (tmp_path / "unmounted").rmdir()
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    assert forked.run(TRAIN, "--resume", run_dir, "training.steps=5").returncode == 0
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_second_process_is_refused_and_the_first_ones_files_stay(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, symlinks=True)
    lock = RunLock(run_dir)
    assert lock.acquire() is None
    before = contents(run_dir)
    for arguments in (["--resume", run_dir], [*RUNS["pretrain"], *ALL, f"run_dir={run_dir}"]):
        refused = forked.run(TRAIN, *arguments, "training.steps=5")
        assert refused.returncode == 2, refused.stderr
        assert "is in use by process" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert contents(run_dir) == before
    lock.release()
    assert forked.run(TRAIN, "--resume", run_dir, "training.steps=5").returncode == 0
