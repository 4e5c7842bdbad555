"""wandb sink with the real wandb, offline: runs killed and resumed, and read back with wandb's own reader.

Not covered: a server. Online runs are tested only up to a server that cannot be reached.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.metrics import jsonl

RUN = Path(__file__).parent / "recorded_run.py"
Result = subprocess.CompletedProcess[str]


def _run(run_dir: Path, *arguments: object, env: Mapping[str, str] | None = None) -> Result:
    quiet = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    return subprocess.run(
        [sys.executable, str(RUN), str(run_dir), *map(str, arguments)],
        env={**quiet, "NETRC": str(run_dir / "no-netrc"), **(env or {})},
        cwd=run_dir,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def _logs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("*run-*/*.wandb"))


def _held(log: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    out = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return [json.loads(line) for line in out.splitlines()]


def _history(run_dir: Path) -> list[dict[str, Any]]:
    records = [record for log in _logs(run_dir) for record in _held(log)]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def _assert_each_step_once(run_dir: Path, last_step: int) -> None:
    """wandb and metrics.jsonl hold the steps 1…last_step, each once, with the same numbers."""
    records = jsonl.read(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, last_step + 1))
    history = _history(run_dir)
    assert [item["_step"] for item in history] == [record["step"] for record in records]
    for item, record in zip(history, records):
        assert {name: item[name] for name in record} == record
        assert item["_timestamp"] == record["time"]


def test_a_run_never_interrupted(tmp_path: Path) -> None:
    result = _run(tmp_path, 1, 12, "total=12")
    assert result.returncode == 0, result.stderr
    _assert_each_step_once(tmp_path, 12)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("wandb: offline; to upload: wandb sync ")
    assert [line.split()[1] for line in lines[1:]] == ["1/12", "5/12", "10/12", "12/12"]
    assert result.stderr == ""
    metrics = [record["metric"] for record in _held(_logs(tmp_path)[0]) if record["type"] == "metric"]
    assert any(m.get("glob_name") == "*" and m.get("step_metric") == "tokens" for m in metrics)
    (best,) = [m["summary"] for m in metrics if m.get("name") == "loss/validation"]
    assert best == {"min": True, "last": True}


def test_an_alert_and_the_expert_load_image(tmp_path: Path) -> None:
    result = _run(tmp_path, 1, 30, "spike=25")
    assert result.returncode == 0, result.stderr
    assert "alert at step 25: loss spike: training loss 90.0000, above" in result.stdout
    (alert,) = [r["alert"] for r in _held(_logs(tmp_path)[0]) if r["type"] == "alert"]
    assert alert["title"] == "loss spike"
    assert alert["text"].startswith("step 25: training loss 90.0000")
    images = [item for item in _history(tmp_path) if "experts/load.path" in item]
    assert [item["_step"] for item in images] == [5, 10, 15, 20, 25, 30]
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    for item in images:
        assert (folder / "files" / item["experts/load.path"]).stat().st_size > 1000


@pytest.mark.parametrize("flushed", [False, True], ids=["wandb lost its buffer", "wandb wrote"])
def test_killed_and_resumed(tmp_path: Path, flushed: bool) -> None:
    """SIGKILL at step 17, the last checkpoint at 15, and then to the end."""
    often = {"WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.2"} if flushed else {}
    pause = "pause=1" if flushed else "pause=0"
    assert _run(tmp_path, 1, 30, "kill_after=17", pause, env=often).returncode == -9
    assert [record["step"] for record in jsonl.read(tmp_path / "metrics.jsonl")][-1] == 17
    # wandb writes a step when the next one is logged: 15 is lost with the service and must be sent again
    assert [item["_step"] for item in _history(tmp_path)] == list(range(1, 15 if flushed else 1))
    result = _run(tmp_path, 16, 30)
    assert result.returncode == 0, result.stderr
    assert "metrics.jsonl: truncated to step 15 (2 lines removed)" in result.stdout
    _assert_each_step_once(tmp_path, 30)
    first, second = _logs(tmp_path)
    assert first.name == second.name, "one run id"


def test_killed_again_and_again(tmp_path: Path) -> None:
    """Two kills, one before a new checkpoint; an unreadable log is reported."""
    for first_step, kill_after in (1, 7), (6, 8):
        assert _run(tmp_path, first_step, 30, f"kill_after={kill_after}").returncode == -9
    assert _run(tmp_path, 6, 30).returncode == 0
    _assert_each_step_once(tmp_path, 30)
    _logs(tmp_path)[-1].write_bytes(b"not a transaction log")
    assert "cannot be read" in _run(tmp_path, 31, 30).stdout


def test_resuming_before_the_last_step_that_wandb_has(tmp_path: Path) -> None:
    """A run that ended at 20 and is resumed from the checkpoint of step 10: wandb keeps the first 11…20."""
    assert _run(tmp_path, 1, 20).returncode == 0
    assert _run(tmp_path, 11, 30).returncode == 0
    assert [item["_step"] for item in _history(tmp_path)] == list(range(1, 31))
    assert [record["step"] for record in jsonl.read(tmp_path / "metrics.jsonl")] == list(range(1, 31))


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    for arguments, env in (["wandb.mode=disabled"], {}), ([], {"WANDB_MODE": "disabled"}):
        assert _run(tmp_path, 1, 2, *arguments, env=env).returncode == 0
        assert not (tmp_path / "wandb").exists()


def test_without_wandb_the_run_continues_and_logs_it_once(tmp_path: Path) -> None:
    """`sys.modules["wandb"] = None` is how Python spells a module that cannot be imported."""
    blocked = tmp_path / "blocked"
    (blocked / "sitecustomize").mkdir(parents=True)
    (blocked / "sitecustomize" / "__init__.py").write_text("import sys\nsys.modules['wandb'] = None\n")
    env = {"PYTHONPATH": f"{blocked}{os.pathsep}{os.environ['PYTHONPATH']}"}
    result = _run(tmp_path, 1, 4, env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wandb: not installed") == 1
    assert len(jsonl.read(tmp_path / "metrics.jsonl")) == 4
    refused = _run(tmp_path, 1, 4, "wandb.mode=offline", env=env)
    assert "UserError: logging.wandb.mode=offline: wandb is not installed" in refused.stderr


def test_online_without_a_login_is_refused(tmp_path: Path) -> None:
    result = _run(tmp_path, 1, 2, "wandb.mode=online")
    assert result.returncode == 1
    assert result.stderr.startswith("UserError: logging.wandb.mode=online: ")
    assert "wandb login" in result.stderr


def test_logged_in_without_a_network_falls_back_to_offline(tmp_path: Path) -> None:
    nowhere = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "0.5"}
    result = _run(tmp_path, 1, 7, "total=7", env=nowhere)
    assert result.returncode == 0, result.stderr
    assert "the server cannot be reached" in result.stdout
    _assert_each_step_once(tmp_path, 7)
    assert result.stderr == ""
    refused = _run(tmp_path, 8, 9, "wandb.mode=online", env=nowhere)
    assert refused.stderr.startswith("UserError: logging.wandb.mode=online: ")
