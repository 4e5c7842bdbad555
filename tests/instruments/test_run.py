"""A run as a user starts it: the instruments' metrics are in its records, alerts, expert load, report and dashboard."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN = [
    "--config-name",
    "pretrain-tiny",
    "run_dir=run",
    "training.steps=3",
    "schedule.warmup_steps=1",
    "training.sequence_length=32",
    "instruments.interval_steps=2",
    "alerts.norm_scale=1.0001",
    "validation.batches=1",
    "validation.bigram_baseline=false",
    "samples.count=0",
    "logging.wandb.mode=offline",
]


# prefixes of the metrics that a pretraining run on a CPU does not have
OF_OTHER_RUNS = (
    "loss/validation/",
    "acceptance_rate/",
    "acceptance_length/",
    "policy/",
    "loss/policy",
    "reward/",
    "rollout/",
    "rl/",
    "train_rollout/",
    "params_norm",
    "skipped_steps",
    "roll_backs",
    "throughput/mfu",
    "throughput/straggler_ratio",
    "experts/load_imbalance_mtp_",
    "experts/dead_mtp_",
)


def recorded_by_wandb(run: Path) -> set[str]:
    """Return every name in the run's offline transaction log, by wandb's own reader, which names a picture by parts."""
    (log,) = run.glob("wandb/*run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in out.splitlines()]
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return {name.partition(".")[0] for item in items for name in item}


def assert_dashboard_shows(recorded: set[str]) -> None:
    """Every recorded number has a panel in the workspace, and every panel a number or a run of another kind."""
    from megatron_q3n.metrics.workspace import build_workspace

    spec = build_workspace("team", "project", "name")._to_model().model_dump(by_alias=True)["spec"]
    sections = spec["section"]["panelBankConfig"]["sections"]
    shown: set[str] = set()
    for config in (plot["config"] for section in sections for plot in section["panels"]):
        names = [*(config.get("metrics") or []), *(config.get("mediaKeys") or [])]
        expression = config.get("metricRegex")
        matches = {name for name in recorded if name in names}
        matches |= {name for name in recorded if expression and re.search(expression, name)}
        candidates = [*names, expression.lstrip("^(").replace("\\", "") if expression else ""]
        assert matches or any(name.startswith(OF_OTHER_RUNS) for name in candidates), config
        shown |= matches
    axes = {"step", "tokens", "time"}
    assert {name for name in recorded if not name.startswith("_")} - axes <= shown


def test_numbers_reach_records_files_and_report(run_module: Callable[..., Any], tmp_path: Path) -> None:
    done = run_module(*RUN)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ["attention/first_token_share_max" in record for record in records] == [True, True, False]
    for name in ("activations/max_layer_3", "gated_delta/half_life_tokens_layer_0", "gradients/norm_mtp"):
        assert records[1][name] > 0, name
    assert 0 < records[1]["throughput/instruments_seconds"] < 60
    assert json.loads((run / "expert_load.json").read_text())["step"] == 3
    report = (run / "report.html").read_text()
    assert "Attention weight on the first token" in report
    assert "norm scale" in report
    assert done.stdout.count("alert at step") == 1, "the kind pauses"
    assert_dashboard_shows(recorded_by_wandb(run))
    assert "alert at step 1: norm scale: " in done.stdout
