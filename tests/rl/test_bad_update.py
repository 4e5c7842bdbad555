"""Bad updates in reinforcement learning under each health policy; instruments and sample tables, which change nothing.

One process; the policies themselves are tested in tests/health, the instruments in tests/instruments.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_q3n.metrics.sample_tables import COLUMNS
from tests.rl.bad_update_runs import BAD_PROMPT, INTERVAL, STEPS
from tests.rl.test_resume import MEASURED, lines, rollouts

INSTRUMENTS = (
    "attention/first_token_share",
    "activations/max",
    "norm_scale/max",
    "router/entropy",
    "gated_delta/half_life_tokens",
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    done = subprocess.run(
        [sys.executable, "-m", "tests.rl.bad_update_runs", str(folder)],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("WANDB")},
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_a_bad_update_is_skipped_and_training_continues(output: Path) -> None:
    records = lines(output / "skip" / "metrics.jsonl")
    assert [r.get("skipped_steps", 0) for r in records] == [0] * 4 + [1] + [2] * 7
    assert records[-1]["rl/kl_to_old"] > 0, "training continues"
    events = (output / "skip/logs/events.log").read_text()
    assert events.count("update withheld (health.non_finite=skip)") == 2


@pytest.mark.slow
def test_a_roll_back_is_the_run_without_that_rollout(output: Path) -> None:
    """Bit for bit, although only one has instruments and wandb."""
    bad, clean = output / "roll_back", output / "clean"
    assert json.loads((bad / "skipped_prompts.json").read_text()) == [[BAD_PROMPT, BAD_PROMPT + 4]]
    assert "going back to step 4" in (bad / "logs/events.log").read_text()
    assert rollouts(bad) == rollouts(clean)
    numbers = {row["prompt"] for rows in rollouts(bad).values() for row in rows}
    assert numbers == set(range(4 * STEPS // 2 + 4)) - set(range(BAD_PROMPT, BAD_PROMPT + 4))
    names = set(lines(clean / "metrics.jsonl")[-1]) - MEASURED - {"roll_backs"}
    metrics = [[{k: r[k] for k in names & set(r)} for r in lines(d / "metrics.jsonl")] for d in (bad, clean)]
    assert metrics[0] == metrics[1]
    assert lines(bad / "metrics.jsonl")[-1]["roll_backs"] == 1


@pytest.mark.slow
def test_stop_reports_the_reason_and_keeps_the_checkpoint(output: Path) -> None:
    message = (output / "stop/refused.txt").read_text()
    assert message.startswith("step 5: loss nan")
    assert "health.non_finite=skip" in message
    newest = (output / "stop/checkpoints/latest").resolve().name
    assert newest == f"step_{INTERVAL:07d}"


@pytest.mark.slow
def test_a_run_whose_scoring_function_returns_nothing_stops_before_it_trains(output: Path) -> None:
    message = (output / "unscored/refused.txt").read_text()
    assert "scoring failed for 9 of the last 9 responses" in message
    assert "a score of type NoneType; return a number" in message
    assert lines(output / "unscored" / "metrics.jsonl") == []


@pytest.mark.slow
def test_the_isolation_of_reward_workers_is_logged_and_recorded(output: Path) -> None:
    isolation = json.loads((output / "skip/environment.json").read_text())["reward_workers"]
    assert set(isolation) >= {"namespaces", "files", "network", "processes", "user", "missing"}
    events = (output / "skip/logs/events.log").read_text()
    assert f"reward workers: namespaces {isolation['namespaces']}; files {isolation['files']}" in events
    assert ("warning: this machine does not isolate" in events) == bool(isolation["missing"])


@pytest.mark.slow
def test_instruments_record_at_their_interval(output: Path) -> None:
    records = lines(output / "roll_back" / "metrics.jsonl")
    for name in INSTRUMENTS:
        assert [r["step"] for r in records if name in r] == [1, 4, 8, 12], name
    assert all(r["router/entropy"] > 0 for r in records if "router/entropy" in r)
    assert not any(name in record for record in lines(output / "clean/metrics.jsonl") for name in INSTRUMENTS)


def tables_in_wandb(run_dir: Path) -> dict[tuple[int, str], Any]:
    """Return every table of samples in the offline run, by step and name, with wandb's own reader."""
    tables = {}
    for log in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for record in map(json.loads, text.splitlines()):
            item = record["history"]["item"] if record["type"] == "history" else {}
            for name in ("samples/held_out", "samples/rollout"):
                if path := item.get(f"{name}.path"):
                    tables[item["_step"], name] = json.loads((log.parent / "files" / path).read_text())
    return tables


@pytest.mark.slow
def test_samples_reach_wandb_and_the_report(output: Path) -> None:
    run_dir = output / "roll_back"
    tables = tables_in_wandb(run_dir)
    assert set(tables) == {
        (1, "samples/held_out"),
        (1, "samples/rollout"),
        (6, "samples/held_out"),
        (12, "samples/held_out"),
    }
    for (step, name), table in tables.items():
        file = f"held_out_{step if step > 1 else 0:07d}" if "held" in name else "after_step_0000000"
        rows = lines(run_dir / "samples" / f"{file}.jsonl")
        assert table["columns"] == list(COLUMNS)
        assert table["data"] == [[row[column] for column in COLUMNS] for row in rows]
    page = (run_dir / "report.html").read_text()
    last = lines(run_dir / "samples/held_out_0000012.jsonl")
    assert "Completions of held-out prompts" in page
    assert "Latest rollout" in page
    assert all(f"<th>{row['question']}</th>" in page for row in last)
