"""Resume after a kill inside a rollout, scoring, update or save: no sample is lost or duplicated."""

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
    "rollout/logprobs_seconds",
    "throughput/step_seconds",
    "throughput/instruments_seconds",
    "memory/peak_gib",
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(output: Path, phase: str) -> None:
    uninterrupted, killed = output / "uninterrupted", output / phase
    assert rollouts(killed) == rollouts(uninterrupted)
    metrics = [
        [{k: v for k, v in record.items() if k not in MEASURED} for record in lines(d / "metrics.jsonl")]
        for d in (uninterrupted, killed)
    ]
    assert metrics[0] == metrics[1]
    assert lines(uninterrupted / "progress.jsonl") == lines(killed / "progress.jsonl")
    events = (killed / "logs" / "events.log").read_text()
    assert "resumed from" in events


@pytest.mark.slow
def test_the_uninterrupted_run_is_a_meaningful_reference(output: Path) -> None:
    """Each sample appears once, zero-variance groups were replaced, and the policy changed."""
    samples = rollouts(output / "uninterrupted")
    assert len(samples) == STEPS // UPDATES
    names = [(row["prompt"], row["member"]) for rows in samples.values() for row in rows]
    assert len(names) == len(set(names)) == 12 * STEPS // UPDATES
    records = lines(output / "uninterrupted" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [r["rl/staleness_max"] for r in records] == [0, 1] * (STEPS // 2)
    assert max(record["rl/kl_to_old"] for record in records) > 0
    assert [row["step"] for row in lines(output / "uninterrupted" / "progress.jsonl")] == [
        *range(INTERVAL, STEPS + 1, INTERVAL)
    ]
    assert lines(output / "uninterrupted" / "progress.jsonl")[-1]["next_prompt"] > 4 * STEPS // UPDATES
