"""The training session is the same for pretraining and RL: callbacks, health policies, logs, early stop and resume.

Tiny runs of one process as a user starts them. Bit for bit equality of resumed and rolled-back runs: test_resume.py,
tests/health, tests/rl.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import forked

CALLBACKS = "tests.stages.session_callbacks"
STEPS = 4
RUNS: dict[str, list[str]] = {
    "pretrain": [
        *("--config-name", "pretrain-tiny", "validation.batches=1", "validation.interval_steps=2"),
        *("validation.bigram_baseline=false", "samples.count=0", "training.sequence_length=32"),
    ],
    "rl": [
        *("--config-name", "rl-tiny", "data.source=stdlib", "model.hidden_size=32", "training.sequence_length=64"),
        *("rl.dynamic_sampling=false", "rl.rollout.prompts=2", "rl.rollout.samples_per_prompt=2"),
        *("rl.reward.kind=function", "rl.reward.function=tests.rl.tiny_loop:score", "rl.reward.workers=1"),
        *("rl.prompts=[{task: {name: chain_sum, size: 40}}]", "rl.held_out=[{task: {name: chain_sum, size: 3}}]"),
        *("rl.held_out_interval_steps=2", "rl.kl_coefficient=0"),
    ],
}
ALL = [
    *(f"training.steps={STEPS}", "schedule.warmup_steps=1", "checkpoint.interval_steps=2"),
    *("checkpoint.asynchronous=false", "instruments.interval_steps=0", "logging.wandb.mode=disabled"),
]
EVALUATIONS = {"pretrain": ["bits_per_byte/validation", "loss/validation"], "rl": ["reward/eval_accuracy"]}


def train(stage: str, run_dir: Path, *settings: str, callbacks: list[str] = []) -> "subprocess.CompletedProcess[str]":  # noqa: B006
    chosen = f"callbacks=[{','.join(callbacks)}]"
    return forked.run("megatron_q3n.train", *RUNS[stage], *ALL, *settings, chosen, f"run_dir={run_dir}")


def callback(name: str, **arguments: Any) -> str:
    values = ",".join(f"{key}: {value}" for key, value in arguments.items())
    return f"{{path: {CALLBACKS}.{name}, arguments: {{{values}}}}}"


LOG = callback("MomentLog", label="here")


def moments(run_dir: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (run_dir / "moments.jsonl").read_text().splitlines()]


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", RUNS)
def test_a_callback_gets_every_moment_in_order(tmp_path: Path, stage: str) -> None:
    run_dir = tmp_path / "run"
    done = train(stage, run_dir, callbacks=[LOG, callback("WithheldUpdate", step=3)])
    assert done.returncode == 0, done.stderr
    steps: list[list[Any]] = []
    for step in range(1, STEPS + 1):
        steps += [["before_step", step], ["before_update", step], ["after_step", step]]
        if step % 2 == 0:
            evaluation = ["after_validation", step, EVALUATIONS[stage]]
            steps += [evaluation, ["before_save", step], ["after_save", step]]
    first_evaluation = [["after_validation", 0, EVALUATIONS[stage]]] if stage == "rl" else []
    start = [["on_run_start", "here"], ["after_load", 0], *first_evaluation]
    assert moments(run_dir) == [*start, *steps, ["on_run_end", "done"]]
    assert all(record["custom/microbatches"] >= 1 for record in records(run_dir))
    assert [record.get("skipped_steps", 0) for record in records(run_dir)] == [0, 0, 1, 1], "WithheldUpdate"
    assert "custom/microbatches" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize("stage", RUNS)
def test_log_and_directory_are_those_of_every_training_run(tmp_path: Path, stage: str) -> None:
    """Decay table, kernel verdicts, model and origin of the weights; how to continue; the same run after a resume."""
    run_dir = tmp_path / "run"
    stopped = train(stage, run_dir, "checkpoint.time_limit_minutes=0.0001", callbacks=[LOG])
    assert stopped.returncode == 75, stopped.stderr
    assert f"continue      python -m megatron_q3n.train --resume {run_dir}" in stopped.stdout
    assert "decoder.layers.0.self_attention.A_log" in (run_dir / "logs" / "weight_decay.txt").read_text()
    log = (run_dir / "logs" / "events.log").read_text()
    for line in (
        "model tiny: ",
        "M active per token; cpu, torch, fp32, 1 process(es)",
        "fresh weights",
        "moments of here",
    ):
        assert line in log, line
    verdicts = json.loads((run_dir / "environment.json").read_text())["backends"]
    assert f"gated delta rule: {verdicts['gated delta rule']}" in log
    assert "training step: CUDA graph: " in log
    reason = "checkpoint.time_limit_minutes reached"
    assert moments(run_dir)[-2:] == [["on_stop", reason], ["on_run_end", "stopped"]]
    other = train(stage, run_dir, "training.seed=5")
    assert other.returncode == 2
    assert "training.seed: 1234 there, 5 here" in other.stderr
    resumed = forked.run("megatron_q3n.train", "--resume", run_dir, "checkpoint.time_limit_minutes=null")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step_0000001 at step 1" in resumed.stdout
    assert "continue" not in resumed.stdout
    assert [record["step"] for record in records(run_dir)] == list(range(1, STEPS + 1))
    assert (run_dir / "summary.json").is_file()
    again = forked.run("megatron_q3n.train", "--resume", run_dir, "checkpoint.time_limit_minutes=null")
    assert again.returncode == 2
    assert "raise training.steps to continue it" in again.stderr


@pytest.mark.parametrize("stage", RUNS)
def test_a_roll_back_loads_the_checkpoint_and_goes_on(tmp_path: Path, stage: str) -> None:
    run_dir = tmp_path / "run"
    bad = callback("ScaledGradients", step=3, factor="nan")
    done = train(stage, run_dir, "health.non_finite=roll_back", callbacks=[bad, LOG])
    assert done.returncode == 0, done.stderr
    assert "step 3: loss nan" in done.stdout
    assert "going back to step 2" in done.stdout
    names = [moment[:2] for moment in moments(run_dir)]
    before = names.index(["on_rollback", 2])
    assert names[before - 2 : before + 3] == [
        ["before_step", 3],
        ["before_update", 3],
        ["on_rollback", 2],
        ["after_load", 2],
        ["before_step", 3],
    ]
    assert names.count(["on_run_start", "here"]) == 1
    assert names[2:4] == [["before_save", 0], ["after_save", 0]], "what a roll-back before the first checkpoint needs"
    assert records(run_dir)[-1]["roll_backs"] == 1
    assert (run_dir / "skipped_prompts.json").is_file() == (stage == "rl")


@pytest.mark.slow
@pytest.mark.parametrize("stage", RUNS)
def test_a_spike_is_skipped(tmp_path: Path, stage: str) -> None:
    run_dir = tmp_path / "run"
    policy = ("health.loss_spike=skip", "health.spike_min_steps=5", "health.spike_deviations=1000", "training.steps=8")
    done = train(stage, run_dir, *policy, callbacks=[callback("ScaledGradients", step=7, factor=1e9)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("update withheld (health.loss_spike=skip)") == 1
    assert "step 7: loss" in done.stdout
    assert [record.get("skipped_steps", 0) for record in records(run_dir)] == [0] * 6 + [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", RUNS)
def test_a_stop_on_a_bad_step_ends_with_2_and_says_why(tmp_path: Path, stage: str) -> None:
    run_dir = tmp_path / "run"
    bad = callback("ScaledGradients", step=3, factor="nan")
    done = train(stage, run_dir, "health.non_finite=stop", callbacks=[bad, LOG])
    assert done.returncode == 2
    assert "error: step 3: loss nan" in done.stderr
    assert "Traceback" not in done.stderr
    assert [moment[0] for moment in moments(run_dir)[-2:]] == ["on_stop", "on_run_end"]
    assert moments(run_dir)[-1] == ["on_run_end", "failed"]
    assert (run_dir / "checkpoints/latest").resolve().name == "step_0000002"
    assert len(records(run_dir)) == 2


@pytest.mark.parametrize("stage", RUNS)
def test_a_bad_path_is_refused_before_there_is_a_directory(tmp_path: Path, stage: str) -> None:
    done = train(stage, tmp_path / "run", callbacks=[callback("Missing")])
    assert done.returncode == 2
    assert f"callbacks[0]: path={CALLBACKS}.Missing: " in done.stderr
    assert "defines no Missing" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
