"""Status and resume of damaged directories: one message and exit code 2; an incomplete last line is no damage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.runs import ROOT


def call(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def run_directory(folder: Path, **files: str | bytes) -> Path:
    """Write the files of a submitted run, some of them with other contents (metrics_jsonl: slurm/… as slurm__…)."""
    contents: dict[str, str | bytes] = {
        "slurm/job.json": json.dumps({"steps": 12, "time": None}),
        "slurm/attempts.jsonl": '{"event": "begin", "step": 0, "nodes": "n1", "attempt": 1, "job": null}\n',
        "metrics.jsonl": '{"step": 1}\n{"step": 2}\n',
        "logs/outcome.json": "{}",
    }
    for name, content in {**contents, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("slurm/job.json", "{"),
        ("slurm/job.json", "[1]"),
        ("slurm/job.json", b"\xff\x00"),
        ("slurm/job.json", '{"steps": "many"}'),
        ("pipeline.json", "[]"),
        ("pipeline.json", '{"stages": []}'),
        ("pipeline.json", '{"stages": [{"name": "../x", "from": null}]}'),
        ("pipeline.json", '{"stages": [{"from": null}]}'),
        ("pipeline.json", b"\x80"),
    ],
)
def test_damaged_descriptions_are_named(tmp_path: Path, name: str, content: str | bytes) -> None:
    folder = run_directory(tmp_path / "run", **{name: content})
    for done in (call("slurm.status", str(folder)), call("slurm.submit", "--dry-run", "--resume", str(folder))):
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.startswith("error: ")
        assert f"{folder}/{name} is damaged" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "files",
    [
        {"metrics.jsonl": '{"step": 1}\n{"step": 2}\n{"st'},
        {"metrics.jsonl": b'{"step": 2}\n\xff\xfe\n[1]\n5\n'},
        {"slurm/attempts.jsonl": b'{"event": "begin", "step": 0, "nodes": ""}\n\xff\n[]\n{"event": "end"}\n{"job'},
        {"logs/outcome.json": "[]", "summary.json": '"x"'},
        {"summary.json": '{"steps": "x"}'},
    ],
)
def test_what_a_kill_may_leave_is_skipped(tmp_path: Path, files: dict[str, str | bytes]) -> None:
    done = call("slurm.status", str(run_directory(tmp_path / "run", **files)))
    assert done.returncode == 0, done.stderr
    assert "running" in done.stdout
    assert "2/12" in done.stdout


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = run_directory(tmp_path / "run")
    (folder / "slurm" / "attempts.jsonl").unlink()
    (folder / "slurm" / "attempts.jsonl").mkdir()
    done = call("slurm.status", str(folder))
    assert done.returncode == 2
    assert f"{folder}/slurm/attempts.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_resumed_run_without_configuration_is_named(tmp_path: Path) -> None:
    done = call("slurm.submit", "--dry-run", "--resume", str(run_directory(tmp_path / "run")))
    assert done.returncode == 2
    assert "no config.yaml" in done.stderr
