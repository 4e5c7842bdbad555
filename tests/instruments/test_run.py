"""A run as a user starts it: its records, its expert load, its alerts and its report know what the instruments saw."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN = [
    "--config-name", "pretrain-tiny", "run_dir=run", "training.steps=3", "schedule.warmup_steps=1",
    "training.sequence_length=32", "instruments.interval_steps=2", "alerts.norm_scale=1.0001", "validation.batches=1",
    "validation.bigram_baseline=false", "samples.count=0", "logging.wandb.mode=disabled",
]  # fmt: skip


def test_numbers_reach_records_files_and_report(
    run_module: Callable[..., Any], tmp_path: Path
) -> None:
    done = run_module(*RUN)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ["sinks/first_token_max" in record for record in records] == [True, True, False]
    for name in ("activations/max_layer_3", "delta/half_life_layer_0", "gradients/norm_mtp"):
        assert records[1][name] > 0, name
    assert 0 < records[1]["throughput/instruments_seconds"] < 60
    assert json.loads((run / "expert_load.json").read_text())["step"] == 3
    report = (run / "report.html").read_text()
    assert "Attention to the first token" in report
    assert "norm growth" in report
    assert done.stdout.count("alert at step") == 1, "the kind pauses"
    assert "alert at step 1: norm growth: largest scale of a norm: 1.00" in done.stdout
