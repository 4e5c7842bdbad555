"""Fault injection for reinforcement learning at random times: no sample may be lost, repeated or scored otherwise.

    python -m tests.rl.random_kills [--kills 20] [--seed 0] [--folder FOLDER]

Not a test of the suite: it takes minutes. One run is undisturbed; another is killed (SIGKILL of the trainer, or of one
of its reward workers) at random times and resumed until it is done, and so are further ones until there were enough
kills. Then their rollouts, metrics and positions in the prompts are compared, and no worker process may be left.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from tests.rank_processes import fork_ranks, import_once
from tests.rl.killed_runs import configuration, run
from tests.rl.test_resume import MEASURED, lines, rollouts

# kills of the trainer per kill of a reward worker
TRAINER_KILLS = 3
END_SECONDS = 5


def main() -> int:
    """Run both, and return 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="random-kills-"))
    config = configuration(folder)
    import_once(config, "megatron_q3n.stages.rl")
    began = time.monotonic()
    if fork_ranks(partial(run, config, folder / "undisturbed", None), 1) != [0]:
        return 1
    seconds = time.monotonic() - began
    kills, generator, differences = {"trainer": 0, "reward worker": 0}, random.Random(options.seed), []
    while sum(kills.values()) < options.kills:
        run_dir = folder / f"disturbed-{sum(kills.values())}"
        disturb(config, run_dir, kills, options.kills, generator, seconds)
        differences += [f"{name} of {run_dir.name}" for name in compare(folder / "undisturbed", run_dir)]
    workers = left()
    print(f"{kills} kills; differences: {differences or 'none'}; worker processes left: {workers or 'none'}; {folder}")
    return 1 if differences or workers else 0


def disturb(
    config: Any, run_dir: Path, kills: dict[str, int], num_kills: int, generator: random.Random, seconds: float
) -> None:
    """Start a run again and again, killing at random times and counting, until it is done."""
    while not (run_dir / "summary.json").is_file():
        process = get_context("fork").Process(target=run, args=(config, run_dir, None, 0))
        process.start()
        while sum(kills.values()) < num_kills and process.is_alive():
            process.join(generator.uniform(0.05, 0.6) * seconds)
            if not process.is_alive():
                break
            kind = "trainer" if generator.randrange(TRAINER_KILLS + 1) else "reward worker"
            kills[kind] += kill(process.pid, kind, generator)
            if kind == "trainer":
                break
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise SystemExit(f"exit code {process.exitcode} after {kills}")


def left() -> list[int]:
    """Return the worker processes that do not end within some seconds."""
    deadline = time.monotonic() + END_SECONDS
    while workers := [process.pid for process in psutil.process_iter(["cmdline"]) if is_worker(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return workers


def kill(trainer: int | None, kind: str, generator: random.Random) -> int:
    """Kill the trainer or one of its reward workers. Returns: 1, or 0 if there is none."""
    assert trainer is not None
    if kind == "trainer":
        os.kill(trainer, signal.SIGKILL)
        return 1
    workers = [child for child in psutil.Process(trainer).children(recursive=True) if is_worker(child)]
    if not workers:
        return 0
    generator.choice(workers).kill()
    return 1


def is_worker(process: psutil.Process) -> bool:
    """Whether a process is a scoring worker process of these runs."""
    try:
        command = process.cmdline()
        is_of_tests = "megatron_q3n.rl.scoring_worker" in command and "tests.rl.tiny_loop" in str(command)
        # not those of another checkout, whose tests may run at the same time
        return is_of_tests and process.cwd() == os.getcwd()
    except psutil.Error:
        return False


def compare(undisturbed: Path, disturbed: Path) -> list[str]:
    """Return which files differ."""
    read = {
        "rollouts": rollouts,
        "metrics": lambda folder: [
            {name: value for name, value in record.items() if name not in MEASURED}
            for record in lines(folder / "metrics.jsonl")
        ],
        "positions": lambda folder: lines(folder / "progress.jsonl"),
    }
    return [name for name, function in read.items() if function(undisturbed) != function(disturbed)]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
