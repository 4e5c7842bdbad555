#!/usr/bin/env python
"""How far reinforcement learning gets with a tiny model in a given time, and that it is the rewards that do it.

    tools/studies/rl_study.py [--seeds 3] [--run-minutes 11.6] [--workers 1] [--minutes 9] [setting=value …]

For each seed: sft-tiny, then from it, in no more than so many minutes each: rl-tiny, rl-tiny with its rewards dealt
out at random (the control), and the same fine-tuning continued. Accuracy is that of the likeliest answers to the 500
held-out questions of rl-tiny. Each run has one core; its time counts from its process's start to its end. Settings go
to rl-tiny. A study that was stopped goes on by the same command. Leaves in --output (runs/rl-study):

    results.json  results.md  rl-study.png  report.html  sft-1/ rl-1/ control-1/ sft_more-1/ … (run directories)

Exit codes: 0 all runs have ended; 2 refused, or a run failed; 75 some were interrupted.
"""

import argparse
import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_q3n.config import EXIT_BAD_INPUT, EXIT_REQUEUE, UserError
from tools.studies.ablations import evidence
from tools.studies.ablations.processes import ROOT
from tools.studies.rl_studies import accuracy
from tools.studies.rl_studies.accuracy import Curve
from tools.studies.rl_studies.runs import Bench, Interrupted, cost, has_ended, runs_in

STUDY = "rl-study"
EXAMINED = 6  # checkpoints of the continued fine-tuning
ENDLESS = "training.steps=100000"
# at the learning rate it ended with
CONTINUED = (
    "checkpoint.load_optimizer=true",
    "schedule.warmup_steps=0",
    "schedule.decay_steps=1",
    "sft.tokenizer_vocab_size=null",
    "sft.chat_template=null",
    "checkpoint.interval_steps=100",
    "checkpoint.keep_last=1000",
    "validation.interval_steps=0",
)


def main() -> int:
    """Run the command line."""
    options = parse(sys.argv[1:])
    output = options.output.resolve()
    try:
        if options.publish:
            evidence.publish(STUDY, output, accuracy.markdown)
            return 0
        bench = Bench(output, options.workers)
        bench.stop_in(options.minutes)
        with ThreadPoolExecutor(10 * options.seeds) as threads:
            study = Study(bench, threads, options.run_minutes, options.settings)
            seeds = [threads.submit(study.seed, seed) for seed in range(1, options.seeds + 1)]
            results = {f"seed {number}": found.result() for number, found in enumerate(seeds, 1)}
        left = sum(3 - len(curves) for curves in results.values())
        left += sum(not has_ended(run_dir) for run_dir in runs_in(output))
        if any(results.values()):
            conclude(output, options, results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if left:
        print("runs are left: give the same command again", flush=True)
    return EXIT_REQUEUE if left else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / STUDY)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run-minutes", type=float, default=11.6, help="of each after sft-tiny")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--minutes", type=float, help="then save what runs, and stop")
    parser.add_argument("--publish", action="store_true", help="write docs/evidence.md; run nothing")
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    return parser.parse_intermixed_args(arguments)


@dataclass(frozen=True)
class Study:
    """What every seed's runs share."""

    bench: Bench
    threads: ThreadPoolExecutor
    minutes: float
    settings: list[str]

    def seed(self, seed: int) -> dict[str, Curve]:
        """Run what has not ended of a seed. Returns: the accuracies over time of each kind of run that there are."""
        try:
            start = self.bench.run("sft-tiny", f"sft-{seed}", f"training.seed={seed}")
        except Interrupted:
            return {}
        common = (f"checkpoint.load={start}", f"training.seed={seed}")
        random = "rl.shuffled_rewards=true"
        ways = {
            "rl": partial(self.learnt, f"rl-{seed}", *common),
            "control": partial(self.learnt, f"control-{seed}", *common, random),
            "sft": partial(self.continued, f"sft_more-{seed}", start, *common, ENDLESS),
        }
        runs: dict[str, Future[Curve]] = {kind: self.threads.submit(way) for kind, way in ways.items()}
        return {kind: curve for kind, run in runs.items() if (curve := run.result())}

    def learnt(self, name: str, *settings: str) -> Curve:
        """Learn from reward; what is there of an interrupted run is told too."""
        run_dir = self.bench.output / name
        try:
            self.bench.run("rl-tiny", name, *settings, *self.settings, minutes=self.minutes)
        except Interrupted:
            if not (run_dir / accuracy.HELD_OUT).is_file():
                return []
        return accuracy.measured(run_dir)

    def continued(self, name: str, start: Path, *settings: str) -> Curve:
        """Go on with the fine-tuning, then examine where it began and some of its checkpoints."""
        try:
            run_dir = self.bench.run("sft-tiny", name, *settings, *CONTINUED, minutes=self.minutes)
            places = {start: 0.0, **accuracy.checkpoints(run_dir, EXAMINED)}
            ways = [partial(self.examined, c, f"examined-{name}-{c.name}") for c in places]
            found = [self.threads.submit(way) for way in ways]
            return [(minutes, run.result()) for minutes, run in zip(places.values(), found)]
        except Interrupted:
            return []

    def examined(self, checkpoint: Path, name: str) -> float:
        """Return a checkpoint's held-out accuracy, by a run that examines it before its only step."""
        # one step, whatever the recipe's rate does over many
        rate = ("schedule.style=constant", "schedule.decay_steps=null", "schedule.warmup_steps=0")
        once = ("training.steps=1", "rl.held_out_interval_steps=0", *rate)
        run_dir = self.bench.run("rl-tiny", name, f"checkpoint.load={checkpoint}", *once)
        return accuracy.before(run_dir)


def conclude(output: Path, options: argparse.Namespace, results: dict[str, dict[str, Curve]]) -> None:
    """Write results, table, picture and report of what there is."""
    directories = runs_in(output)
    found = {
        "command": " ".join(["tools/studies/rl_study.py", f"--run-minutes {options.run_minutes:g}", *options.settings]),
        "machine": accuracy.machine(directories[0]),
        "curves": results,
        "costs": {d.name: cost(d) for d in directories},
        "interrupted": [d.name for d in directories if not has_ended(d)],
    }
    (output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    text = accuracy.markdown(found, f"{STUDY}.png")
    (output / "results.md").write_text(text)
    accuracy.draw(output / f"{STUDY}.png", results)
    (output / "report.html").write_text(accuracy.page(found, output / f"{STUDY}.png"))
    print(f"\n{text}\nleft in {output}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
