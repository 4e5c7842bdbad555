"""Small runs for the tests: settings, submission, and readers of their run directories."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parent.parent.parent
FAULTS = Path(__file__).parent / "faults"
SITE: dict[str, Any] = {
    "partition": "batch",
    "time": "10:00",
    "save_margin_seconds": 60,
    "processes_per_node": 1,
    "cpus_per_process": 2,
    "python": sys.executable,
    "node_python": sys.executable,
    "master_address": "127.0.0.1",
    "environment": {},
    "attempts_without_progress": 3,
    "preflight": {
        "minimum_free_gib": 0.1,
        "minimum_disk_mib_per_second": 0,
        "minimum_network_mib_per_second": 0,
        "timeout_seconds": 20,
    },
}
SMALL = [
    "training.steps=12",
    "training.sequence_length=64",
    "training.micro_batch_size=2",
    "validation.interval_steps=6",
    "validation.batches=1",
    "validation.bigram_baseline=false",
    "checkpoint.interval_steps=4",
    "samples.count=0",
    "schedule.warmup_steps=2",
    "logging.wandb.mode=disabled",
    "logging.interval_steps=1",
]
COMPARED = ("loss/train", "loss/mtp_1", "loss/load_balancing", "grad_norm", "learning_rate", "loss/validation")


def with_fault(fault: str, once: Path | None = None) -> dict[str, str]:
    """Return the environment variables that inject a fault into the training processes."""
    extra = {"PYTHONPATH": str(FAULTS), "Q3N_FAULT": fault}
    return SITE["environment"] | extra | ({"Q3N_FAULT_ONCE": str(once)} if once else {})


def submit(cluster: Cluster, *arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the submit command as a user of the cluster."""
    return subprocess.run(
        [sys.executable, "-m", "slurm.submit", *arguments],
        cwd=root,
        env={**cluster.environment, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def submitted(cluster: Cluster, *arguments: str, root: Path = ROOT) -> list[str]:
    """Submit with the code in `root`, assert success, and return the job ids."""
    result = submit(cluster, *arguments, root=root)
    assert result.returncode == 0, result.stderr
    return [line.split()[1] for line in result.stdout.splitlines() if line.startswith("job ")]


def train_without_slurm(run_dir: Path, *settings: str) -> Path:
    """Train in one process without Slurm."""
    command = [sys.executable, "-m", "megatron_q3n.train", "--config-name", "pretrain-tiny", *SMALL]
    subprocess.run(
        [*command, f"run_dir={run_dir}", *settings],
        cwd=ROOT,
        env=os.environ,
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=120,
    )
    return run_dir


def numbers(run_dir: Path, steps: int = 12) -> list[dict[str, Any]]:
    """Return the compared metrics of each step, after asserting that each step is recorded once."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, steps + 1)), "each step once"
    return [{name: record.get(name) for name in COMPARED} for record in records]


def wait_for_steps(run_dir: Path, steps: int, seconds: float = 90) -> None:
    """Wait until `steps` steps are recorded."""
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + seconds
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps):
        assert time.monotonic() < deadline, run_logs(run_dir)
        time.sleep(0.02)


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    """Return the training processes of a run on this machine, without launchers."""
    processes = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:3] == ["-m", "megatron_q3n.train"] and str(run_dir) in words:
            processes.append(process)
    return processes


def decisions(run_dir: Path) -> list[str]:
    """Return the supervisor's decision at the end of each attempt that it recorded."""
    lines = (run_dir / "slurm" / "attempts.jsonl").read_text().splitlines()
    return [line["decision"] for line in map(json.loads, lines) if line["event"] == "end"]


def run_logs(run_dir: Path) -> str:
    """Return the event log and the job output of a run, for messages of failed assertions."""
    parts = [path.read_text() for path in sorted((run_dir / "logs").glob("*.log"))]
    parts += [path.read_text()[-4000:] for path in sorted((run_dir / "logs").glob("slurm-*.out"))]
    return "\n----\n".join(parts)
