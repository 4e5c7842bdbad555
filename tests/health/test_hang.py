"""A process without progress ends itself and writes its stacks, even when it holds Python's interpreter lock.

Several ranks together: tests/slurm/test_trouble.py.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forked

PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from megatron_q3n.config.health import HealthConfig
from megatron_q3n.health import hang

hang.GRACE_SECONDS = 0.5
settings = HealthConfig(hang_factor=3, hang_min_seconds=1.5, hang_startup_seconds=3)

def stuck_here():
    {stuck}

detector = hang.HangDetector(settings, Path(sys.argv[1]), rank=3, host="n1")
detector.start()
for _ in range(8):
    time.sleep(0.3)
    detector.heartbeat(0.3)
stuck_here()
detector.stop()
time.sleep(2)
print("went on")
"""


def run(run_dir: Path, stuck: str) -> tuple["subprocess.CompletedProcess[str]", float]:
    (run_dir / "logs").mkdir()
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(stuck=stuck), str(run_dir)],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done, time.monotonic() - began


def test_steps_in_time_and_a_short_pause_are_no_hang(tmp_path: Path) -> None:
    done, _ = run(tmp_path, "time.sleep(0.8)")
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    assert not (tmp_path / "logs" / "stacks").exists()


def test_a_hang_leaves_stacks_a_line_in_the_log_and_code_70(tmp_path: Path) -> None:
    done, seconds = run(tmp_path, "time.sleep(1000)")
    assert done.returncode == 70
    assert seconds < 20
    assert "stuck_here" in (tmp_path / "logs/stacks/rank_00003.txt").read_text()
    assert "stuck_here" in done.stderr
    assert "rank 3 on n1: no progress for 2 s" in (tmp_path / "logs/events.log").read_text()


def test_a_hang_that_holds_the_interpreter_lock_is_ended_too(tmp_path: Path) -> None:
    """No Python runs then; the stacks are on stderr only."""
    done, seconds = run(tmp_path, "ctypes.PyDLL(None).sleep(1000)")
    assert done.returncode == 1
    assert seconds < 20
    assert "stuck_here" in done.stderr


@pytest.mark.slow
def test_a_hang_of_reinforcement_learning_is_detected_too(tmp_path: Path) -> None:
    from tests.slurm.runs import FAULTS

    tiny = [
        *("model.hidden_size=32", "training.sequence_length=64", "training.steps=9"),
        *("rl.held_out=[]", "rl.rollout.prompts=2", "rl.rollout.samples_per_prompt=2"),
        *("logging.wandb.mode=disabled", "data.source=stdlib", f"run_dir={tmp_path}/run"),
        *("health.hang_min_seconds=4", "health.hang_factor=3", "rl.dynamic_sampling=false"),
    ]
    done = forked.run(
        "megatron_q3n.train",
        "--config-name",
        "rl-tiny",
        *tiny,
        PYTHONPATH=os.pathsep.join((str(FAULTS), os.environ["PYTHONPATH"])),
        Q3N_FAULT="hang@4:0",
    )
    assert done.returncode == 70, done.stderr[-3000:]
    assert "sitecustomize.py" in (tmp_path / "run/logs/stacks/rank_00000.txt").read_text()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_slow_rank_is_named(tmp_path: Path) -> None:
    from tests.slurm.runs import FAULTS, ROOT, SMALL

    path = os.pathsep.join((str(FAULTS), os.environ["PYTHONPATH"]))
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            *launcher,
            "megatron_q3n.train",
            "--config-name",
            "pretrain-tiny",
            *SMALL,
            f"run_dir={tmp_path}/run",
            "health.straggler_interval_steps=4",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "Q3N_FAULT": "slow@2:1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 8: rank 1 on" in done.stdout
    assert "is slow" in done.stdout
    assert (tmp_path / "run/logs/stragglers.jsonl").read_text().count('"step"') == 3
