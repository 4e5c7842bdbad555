"""A run killed inside a rollout, a grading, an update or a save goes on as a whole one: no sample lost or doubled."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.rl.killed_runs import INTERVAL, PHASES, STEPS, UPDATES

MEASURED = {
    "time",
    "rollout/seconds",
    "rollout/look_back_seconds",
    "throughput/step_seconds",
    "throughput/instruments_seconds",
    "memory/peak_gib",
}


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    done = subprocess.run(
        [sys.executable, "-m", "tests.rl.killed_runs", str(folder)],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rollouts(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    return {p.name: lines(p) for p in sorted((run_dir / "samples").glob("after_step_*.jsonl"))}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_run_ends_as_a_whole_one(left: Path, phase: str) -> None:
    whole, killed = left / "whole", left / phase
    assert rollouts(killed) == rollouts(whole)
    kept = [
        [{k: v for k, v in record.items() if k not in MEASURED} for record in lines(d / "metrics.jsonl")]
        for d in (whole, killed)
    ]
    assert kept[0] == kept[1]
    assert lines(whole / "progress.jsonl") == lines(killed / "progress.jsonl")
    events = (killed / "logs" / "events.log").read_text()
    assert "resumed from" in events


@pytest.mark.slow
def test_the_whole_run_is_one_to_compare_with(left: Path) -> None:
    """Each sample once, groups were drawn anew, and the policy moved."""
    drawn = rollouts(left / "whole")
    assert len(drawn) == STEPS // UPDATES
    names = [(row["prompt"], row["member"]) for rows in drawn.values() for row in rows]
    assert len(names) == len(set(names)) == 12 * STEPS // UPDATES
    records = lines(left / "whole" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [r["rl/staleness_max"] for r in records] == [0, 1] * (STEPS // 2)
    assert max(record["rl/kl_to_old"] for record in records) > 0
    assert [row["step"] for row in lines(left / "whole" / "progress.jsonl")] == [*range(INTERVAL, STEPS + 1, INTERVAL)]
    assert lines(left / "whole" / "progress.jsonl")[-1]["next_prompt"] > 4 * STEPS // UPDATES
