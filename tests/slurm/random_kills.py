"""Kill a pipeline at random, over and over, and see that it ends with the losses of one left alone.

    python -m tests.slurm.random_kills [--kills 20] [--seed 0]

Not a test of the suite: it takes half an hour. On a real Slurm of two nodes with one process each it runs
pipeline-tiny, all its stages shortened, twice. The second time it disturbs the jobs at random moments, each training
stage a few times: SIGKILL of a rank or of srun, `scontrol requeue`, TERM to the training, a node set down. Then it
compares every loss, gradient norm and reward. Not done: SIGKILL of the supervisor, which is the job's batch process;
Slurm then calls the job failed, and only `submit --resume` goes on.
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
# what must not differ: all but what measures time and memory
COMPARED = (
    "tokens",
    "loss/",
    "grad_norm",
    "learning_rate",
    "bits_per_byte/",
    "acceptance/",
    "reward/",
    "rl/",
    "skipped_steps",
)


def main() -> int:
    """Run both, and print what was done and what came out; 1 if the two differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="random_kills."))
    cluster = Cluster(folder / "slurm")
    cluster.root.mkdir()
    try:
        cluster.start()
        left_alone = run(cluster, folder / "left_alone", random.Random(given.seed), kills=0)
        disturbed = run(
            cluster, folder / "disturbed", random.Random(given.seed), given.kills, folder / "left_alone" / "code"
        )
    finally:
        cluster.stop()
    for stage in TRAINED:
        same = left_alone[stage] == disturbed[stage]
        print(f"{stage}: {len(disturbed[stage])} steps, {'bit-equal' if same else 'DIFFERENT'}")
    print(f"everything is in {folder}")
    return int(left_alone != disturbed)


def run(cluster: Cluster, folder: Path, luck: random.Random, kills: int, root: Path = ROOT) -> dict[str, list]:
    """Run the pipeline to its end with so many disturbances; return the compared numbers of each stage."""
    site = folder.with_suffix(".yaml")
    site.write_text(json.dumps(SITE | {"attempts_without_progress": 50}))
    began = time.monotonic()
    jobs = submitted(
        cluster, "--config-name", "pipeline-tiny", "--site", str(site), "--run-dir", str(folder), *SHORT, root=root
    )
    done = 0
    while cluster.state(jobs[-1]) not in ("COMPLETED", "CANCELLED", "FAILED"):
        if done < kills * share_until_now(cluster, jobs):
            done += disturb_once(cluster, folder, jobs, luck)
        time.sleep(0.5)
    states = [cluster.state(job) for job in jobs]
    print(f"{folder.name}: {done} disturbances, {time.monotonic() - began:.0f} s, {states}", flush=True)
    return {stage: losses(folder / stage) for stage in TRAINED}


def share_until_now(cluster: Cluster, jobs: list[str]) -> float:
    """Return which part of the training stages have at least begun."""
    done = sum(cluster.state(job) == "COMPLETED" for job in jobs)
    return min(done + 1, len(TRAINED)) / len(TRAINED)


def disturb_once(cluster: Cluster, folder: Path, jobs: list[str], luck: random.Random) -> bool:
    """Wait a random while and disturb what runs then; False if nothing did."""
    time.sleep(luck.uniform(12, 34))
    running = [job for job in jobs if cluster.state(job) == "RUNNING"]
    if not running:
        return False
    stage = folder / STAGES[jobs.index(running[0])]
    kind = luck.choice(["rank", "rank", "rank", "srun", "requeue", "term", "node"])
    print(f"  {time.strftime('%T')} {stage.name}: {kind}", flush=True)
    if kind == "rank" and (ranks := ranks_of(stage)):
        luck.choice(ranks).send_signal(signal.SIGKILL)
    elif kind == "srun":
        for process in sruns_of(stage):
            process.send_signal(signal.SIGKILL)
    elif kind == "requeue":
        cluster.run("scontrol", "requeue", running[0])
    elif kind == "term":
        cluster.run("scancel", "--signal=TERM", running[0])
    elif kind == "node":
        cluster.lose("n1")
        time.sleep(1)
        cluster.bring_back("n1")
    return True


def sruns_of(stage: Path) -> list[psutil.Process]:
    """Return the srun processes of a stage."""
    named = (p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0] == "srun")
    return [process for process in named if str(stage) in " ".join(process.info["cmdline"])]


def losses(run_dir: Path) -> list[dict[str, float]]:
    """Return the compared numbers of each step."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [{k: v for k, v in record.items() if k.startswith(COMPARED)} for record in records]


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", WANDB_MODE="offline")
    sys.exit(main())
