"""Fault injection for a pipeline at random times: the losses must equal those of an undisturbed pipeline.

    python -m tests.slurm.random_kills [--kills 20] [--seed 0]

Not a test of the suite: it takes half an hour. On a Slurm cluster of two nodes with one process each it runs
pipeline-tiny, with all stages shortened, twice. The second run is disturbed at random times, each training stage
several times: SIGKILL of a rank or of srun, `scontrol requeue`, TERM to the training, a node set down. Then all losses,
gradient norms and rewards are compared. Not covered: SIGKILL of the supervisor, which is the batch process of the job;
Slurm then marks the job as failed, and only `submit --resume` continues.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.slurm.cluster import Cluster
from tests.slurm.runs import ROOT, SITE, ranks_of, submitted

SHORT = [
    "all.training.sequence_length=64",
    "all.validation.batches=1",
    "all.samples.count=0",
    "all.logging.wandb.mode=offline",
    "all.checkpoint.interval_steps=5",
    "pretrain.training.micro_batch_size=2",
    "pretrain.training.steps=100",
    "pretrain.parallel.world_size=2",
    "longcontext.training.micro_batch_size=2",
    "longcontext.training.steps=40",
    "longcontext.parallel.world_size=2",
    "sft.training.steps=40",
    "rl.training.steps=20",
    "mtp.training.steps=20",
]
STAGES = ("pretrain", "longcontext", "sft", "rl", "mtp", "export")
TRAINED = STAGES[:-1]
# metrics that must be equal: all except times and memory
COMPARED = (
    "tokens",
    "loss/",
    "grad_norm",
    "learning_rate",
    "bits_per_byte/",
    "acceptance_rate/",
    "acceptance_length/",
    "reward/",
    "rl/",
    "skipped_steps",
)


def main() -> int:
    """Run both pipelines and print the result; return 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="random_kills."))
    cluster = Cluster(folder / "slurm")
    cluster.root.mkdir()
    try:
        cluster.start()
        undisturbed = run(cluster, folder / "undisturbed", random.Random(arguments.seed), kills=0)
        disturbed = run(
            cluster,
            folder / "disturbed",
            random.Random(arguments.seed),
            arguments.kills,
            folder / "undisturbed" / "code",
        )
    finally:
        cluster.stop()
    for stage in TRAINED:
        same = undisturbed[stage] == disturbed[stage]
        print(f"{stage}: {len(disturbed[stage])} steps, {'bit-equal' if same else 'DIFFERENT'}")
    print(f"everything is in {folder}")
    return int(undisturbed != disturbed)


def run(cluster: Cluster, folder: Path, rng: random.Random, kills: int, root: Path = ROOT) -> dict[str, list]:
    """Run the pipeline to its end with `kills` disturbances; return the compared metrics of each stage."""
    site = folder.with_suffix(".yaml")
    site.write_text(json.dumps(SITE | {"attempts_without_progress": 50}))
    began = time.monotonic()
    jobs = submitted(
        cluster, "--config-name", "pipeline-tiny", "--site", str(site), "--run-dir", str(folder), *SHORT, root=root
    )
    done = 0
    while cluster.state(jobs[-1]) not in ("COMPLETED", "CANCELLED", "FAILED"):
        if done < kills * fraction_started(cluster, jobs):
            done += disturb_once(cluster, folder, jobs, rng)
        time.sleep(0.5)
    states = [cluster.state(job) for job in jobs]
    print(f"{folder.name}: {done} disturbances, {time.monotonic() - began:.0f} s, {states}", flush=True)
    return {stage: losses(folder / stage) for stage in TRAINED}


def fraction_started(cluster: Cluster, jobs: list[str]) -> float:
    """Return the fraction of training stages that have started."""
    done = sum(cluster.state(job) == "COMPLETED" for job in jobs)
    return min(done + 1, len(TRAINED)) / len(TRAINED)


def disturb_once(cluster: Cluster, folder: Path, jobs: list[str], rng: random.Random) -> bool:
    """Wait a random time, then disturb the running stage; return False if none is running."""
    time.sleep(rng.uniform(12, 34))
    running = [job for job in jobs if cluster.state(job) == "RUNNING"]
    if not running:
        return False
    stage = folder / STAGES[jobs.index(running[0])]
    kind = rng.choice(["rank", "rank", "rank", "srun", "requeue", "term", "node"])
    print(f"  {time.strftime('%T')} {stage.name}: {kind}", flush=True)
    if kind == "rank" and (ranks := ranks_of(stage)):
        rng.choice(ranks).send_signal(signal.SIGKILL)
    elif kind == "srun":
        for process in sruns_of(stage):
            process.send_signal(signal.SIGKILL)
    elif kind == "requeue":
        cluster.run("scontrol", "requeue", running[0])
    elif kind == "term":
        cluster.run("scancel", "--signal=TERM", running[0])
    elif kind == "node":
        cluster.set_down("n1")
        time.sleep(1)
        cluster.resume_node("n1")
    return True


def sruns_of(stage: Path) -> list[psutil.Process]:
    """Return the srun processes of a stage."""
    named = (p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0] == "srun")
    return [process for process in named if str(stage) in " ".join(process.info["cmdline"])]


def losses(run_dir: Path) -> list[dict[str, float]]:
    """Return the compared metrics of each step."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [{k: v for k, v in record.items() if k.startswith(COMPARED)} for record in records]


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", WANDB_MODE="offline")
    sys.exit(main())
