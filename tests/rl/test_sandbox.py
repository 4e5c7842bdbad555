"""Sandbox of reward workers: attacks by answers, on this machine, with every measure and with fewer of them."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rl.hostile_answers import ATTACKS, SECRET

ROOT = Path(__file__).parent.parent.parent
# as in a container that forbids user namespaces, to a root user without capabilities
WITHOUT_NAMESPACES = (
    *("unshare", "--user", "--map-root-user", "sh", "-c"),
    'echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set -all --inh-caps -all -- "$@"',
    "sh",
)
BOUNDED = {
    "memory": {"MemoryError: "},
    "memory_of_children": {"more than 0.5 GiB of memory (rl.reward.memory_gib)"},
    "many_processes": {"more than 16 processes", "more than 0.5 GiB of memory (rl.reward.memory_gib)"},
    "hang": {"time limit"},
    "busy": {"time limit", "crash"},
    "large_score": {"a score of 1e+39; it must be a number from -1e+06 to 1e+06"},
    "exit": {"SystemExit: "},
    "forged": {"a reply of another form"},
    "forged_integer": {"a score of inf; it must be a number from -1e+06 to 1e+06"},
    "forged_nesting": {"a reply that is not JSON"},
}
# by the files' and processes' owner alone, an answer may do what the user may
UNPROTECTED = {"other_environments", "read_file", "write_file", "remove_file", "signal"}
UNCONFINED = {"changed_module", "orphan", "output", "scratch", "child", "standard_input", "two_replies", "last"}


@pytest.fixture
def targets(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """Listen on a TCP port and a Unix socket, and write files outside of the workers' folders."""
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "removable").touch()
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
        unix.listen()
        yield tmp_path, tcp.getsockname()[1]


def attacked(targets: tuple[Path, int], wrapper: tuple[str, ...] = (), *removed: str) -> dict[str, Any]:
    folder, port = targets
    command = [*wrapper, sys.executable, "-m", "tests.rl.hostile_answers", str(folder), str(port), *removed]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"WANDB_API_KEY": SECRET, "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=300,
    )
    if wrapper and done.returncode != 0 and "unshare" in done.stderr:
        pytest.skip(f"this machine has no user namespaces to forbid: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stderr) < 100_000
    return json.loads(done.stdout)


def succeeded(report: dict[str, Any]) -> set[str]:
    return {name for name, (score, _) in report["results"].items() if score > 0}


def check_bounds(report: dict[str, Any]) -> None:
    """Check what holds at every level: limits, no process left, and no effect on the next answer."""
    assert set(report["results"]) == set(ATTACKS)
    for name, reasons in BOUNDED.items():
        assert report["results"][name][1] in reasons, name
    for name in UNCONFINED | {"environment"}:
        assert report["results"][name] == [0.0, None], name
    for name in ("tcp", "udp", "unix_socket"):
        assert report["results"][name][1] == "PermissionError: [Errno 1] Operation not permitted"
    assert {name: count for name, count in report["left"].items() if count} == {}


def test_no_attack_succeeds_with_the_measures_of_this_machine(targets: tuple[Path, int]) -> None:
    report = attacked(targets)
    check_bounds(report)
    if report["isolation"]["missing"]:
        pytest.skip(f"this machine cannot isolate {report['isolation']['missing']}")
    assert succeeded(report) == set()
    assert sorted(path.name for path in targets[0].iterdir()) == ["removable", "secret", "socket"]


def test_no_attack_succeeds_where_namespaces_are_forbidden(targets: tuple[Path, int]) -> None:
    report = attacked(targets, WITHOUT_NAMESPACES)
    check_bounds(report)
    isolation = report["isolation"]
    assert isolation["namespaces"] == "none"
    assert len(isolation["refused"]) == 3
    assert "seccomp" in isolation["network"]
    if not isolation["missing"]:
        assert succeeded(report) == set()


def test_without_namespaces_and_landlock_limits_hold_and_the_report_names_what_is_open(
    targets: tuple[Path, int],
) -> None:
    report = attacked(targets, WITHOUT_NAMESPACES, "landlock_create_ruleset")
    check_bounds(report)
    assert report["isolation"]["files"] == "none"
    assert succeeded(report) <= UNPROTECTED
    if "unprivileged" not in report["isolation"]["user"]:
        assert report["isolation"]["missing"] == [
            "the trainer's environment and memory",
            "files outside of the scoring",
            "writing files",
            "signals to other processes",
        ]
        assert {"read_file", "write_file", "signal"} <= succeeded(report)
