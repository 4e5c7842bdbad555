"""Supervisor outside Slurm: its decisions by exit code and signal, with shell commands instead of training.

Inside Slurm: test_interruptions.py and test_trouble.py.
"""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from slurm import progress
from slurm.supervise import find_unfit_nodes
from tests.slurm.runs import ROOT

NODE_MODULES = ("supervise", "preflight", "progress")


def job_file(run_dir: Path, shell: str, **changes: Any) -> Path:
    """Write the job description of a stage whose training is a shell command."""
    for name in ("logs", "slurm", "checkpoints"):
        (run_dir / name).mkdir(parents=True)
    job: dict[str, Any] = {
        "run_dir": str(run_dir),
        "code": str(ROOT),
        "command": ["bash", "-c", shell],
        "steps": None,
        "launcher": "local",
        "attempts_without_progress": 3,
        "preflight": None,
        "environment": {},
    }
    path = run_dir / "slurm" / "job.json"
    path.write_text(json.dumps(job | changes))
    return path


def supervise(path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "slurm.supervise", str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )


def decisions(run_dir: Path) -> list[tuple[str, int]]:
    return [(a["decision"], a["code"]) for a in progress.attempts(run_dir) if a["event"] == "end"]


@pytest.mark.parametrize(
    ("shell", "code", "expected"),
    [
        ("exit 0", 0, [("done", 0)]),
        ("exit 2", 2, [("failed", 2)]),
        ("exit 1", 4, [("again", 1)] * 3 + [("gave up", 4)]),
        ("kill -KILL $$", 4, [("again", 137)] * 3 + [("gave up", 4)]),
        # torchrun replaces every exit code by 1, so outcome.json takes precedence
        ('echo \'{"code": 2, "message": "no"}\' > $RUN/logs/outcome.json; exit 1', 2, [("failed", 2)]),
        ("echo '{\"code\": 0}' > $RUN/logs/outcome.json; exit 143", 0, [("done", 0)]),
    ],
)
def test_decision_by_exit_code(tmp_path: Path, shell: str, code: int, expected: list[tuple[str, int]]) -> None:
    process = supervise(job_file(tmp_path, shell, environment={"RUN": str(tmp_path)}))
    process.communicate(timeout=60)
    assert process.returncode == code
    assert decisions(tmp_path) == expected


def test_progress_resets_the_count(tmp_path: Path) -> None:
    """Each attempt saves one more step and crashes; the seventh has nothing left to do."""
    one_more = (
        "n=$(($(ls $RUN/checkpoints | wc -l) + 1)); mkdir $RUN/checkpoints/step_$n; "
        "echo '{}' > $RUN/checkpoints/step_$n/checkpoint.json; "
        """[ $n = 6 ] && echo '{"steps": 6}' > $RUN/summary.json; exit 1"""
    )
    path = job_file(tmp_path, one_more, steps=6, attempts_without_progress=2, environment={"RUN": str(tmp_path)})
    process = supervise(path)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert decisions(tmp_path) == [("again", 1)] * 6 + [("done", 0)]


def test_sigterm_is_forwarded_to_the_training_and_ends_the_run(tmp_path: Path) -> None:
    saves = "trap 'echo saved > $RUN/saved; exit 75' TERM; touch $RUN/ready; while :; do sleep 0.1; done"
    process = supervise(job_file(tmp_path, saves, environment={"RUN": str(tmp_path)}))
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert (tmp_path / "saved").exists()
    assert decisions(tmp_path) == [("stopped", 75)]


@pytest.mark.parametrize(
    ("reports", "unfit"),
    [
        ({"a": [], "b": []}, []),
        ({"a": []}, ["b"]),
        ({"a": ["disk: full"], "b": []}, ["a"]),
        ({"a": ["network: b:1 (node 1) cannot be reached"], "b": ["network: nothing received from node 0"]}, ["b"]),
        (
            {"a": [], "b": ["network: c:1 (node 2) cannot be reached"], "c": ["network: nothing received from node 1"]},
            ["c"],
        ),
        # a local problem of a node takes precedence over failed connections
        ({"a": ["network: b:1 (node 1) cannot be reached"], "b": ["gpu 3: 7 uncorrected memory errors"]}, ["b"]),
    ],
)
def test_unfit_nodes(tmp_path: Path, reports: dict[str, list[str]], unfit: list[str]) -> None:
    nodes = ["a", "b", *(["c"] if "c" in reports else [])]
    for node, problems in reports.items():
        (tmp_path / f"{node}.json").write_text(json.dumps({"node": node, "problems": problems}))
    messages: list[str] = []
    assert find_unfit_nodes(tmp_path, nodes, messages.append) == unfit
    assert bool(messages) == bool(unfit)


@pytest.mark.parametrize("name", NODE_MODULES)
def test_modules_for_nodes_use_the_standard_library_only(name: str) -> None:
    """Parsed with the grammar of Python 3.9; execution with it is not covered."""
    source = (ROOT / "slurm" / f"{name}.py").read_text()
    tree = ast.parse(source, feature_version=(3, 9))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    foreign = {module for module in imported if module.split(".")[0] not in sys.stdlib_module_names}
    assert foreign <= {"slurm"}
    assert "from __future__ import annotations" in source
