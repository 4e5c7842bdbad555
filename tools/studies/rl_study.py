#!/usr/bin/env python
"""Study of reinforcement learning with a tiny model on CPUs: held-out accuracy within a time limit, with controls.

    tools/studies/rl_study.py [--seeds 3] [--run-minutes 11.6] [--workers 1] [--minutes 9] [setting=value …]

For each seed: sft-tiny, then from its checkpoint, within --run-minutes each: rl-tiny, rl-tiny with randomly permuted
rewards (the control), and more of the same fine-tuning. Accuracy is that of greedy responses to the 500 held-out
questions of rl-tiny. Each run has one core; its time is the wall time of its processes, including their start. Settings
go to rl-tiny. The same command continues a study that was stopped. Writes to --output (runs/rl-study):

    results.json  results.md  rl-study.png  report.html  sft-1/ rl-1/ control-1/ sft_more-1/ … (run directories)

Exit codes: 0 all runs have ended; 2 invalid arguments, or a run failed; 75 some runs were interrupted.
"""

import argparse
import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_q3n.config import EXIT_BAD_INPUT, EXIT_REQUEUE, UserError
from megatron_q3n.config.override_text import override
from tools.studies.ablations import evidence
from tools.studies.ablations.processes import ROOT
from tools.studies.rl_studies import accuracy
from tools.studies.rl_studies.accuracy import Curve
from tools.studies.rl_studies.runs import Interrupted, RecipeRunner, cost, has_ended, runs_in

STUDY = "rl-study"
# checkpoints of the continued fine-tuning that are evaluated
NUM_EVALUATED = 6
UNLIMITED_STEPS = "training.steps=100000"
# fine-tuning continues at its final learning rate
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
        runner = RecipeRunner(output, options.workers)
        runner.stop_after(options.minutes)
        with ThreadPoolExecutor(10 * options.seeds) as threads:
            study = Study(runner, threads, options.run_minutes, options.settings)
            seeds = [threads.submit(study.run_seed, seed) for seed in range(1, options.seeds + 1)]
            results = {f"seed {number}": future.result() for number, future in enumerate(seeds, 1)}
        num_left = sum(3 - len(curves) for curves in results.values())
        num_left += sum(not has_ended(run_dir) for run_dir in runs_in(output))
        if any(results.values()):
            write_results(output, options, results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if num_left:
        print("some runs have not ended: repeat the command to continue", flush=True)
    return EXIT_REQUEUE if num_left else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / STUDY)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run-minutes", type=float, default=11.6, help="time limit of each run after sft-tiny")
    parser.add_argument("--workers", type=int, default=1, help="runs in parallel")
    parser.add_argument("--minutes", type=float, help="time limit of this command; then it saves all runs and stops")
    parser.add_argument("--publish", action="store_true", help="write docs/evidence.md; run nothing")
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    return parser.parse_intermixed_args(arguments)


@dataclass(frozen=True)
class Study:
    """The runs of all seeds; the settings they share."""

    runner: RecipeRunner
    threads: ThreadPoolExecutor
    minutes: float
    settings: list[str]

    def run_seed(self, seed: int) -> dict[str, Curve]:
        """Run what has not ended of a seed. Returns: accuracy over time of each kind of run that has results."""
        try:
            start = self.runner.run("sft-tiny", f"sft-{seed}", f"training.seed={seed}")
        except Interrupted:
            return {}
        common = (override("checkpoint.load", start), f"training.seed={seed}")
        shuffled = "rl.shuffled_rewards=true"
        tasks = {
            "rl": partial(self.train_rl, f"rl-{seed}", *common),
            "control": partial(self.train_rl, f"control-{seed}", *common, shuffled),
            "sft": partial(self.continue_sft, f"sft_more-{seed}", start, *common, UNLIMITED_STEPS),
        }
        runs: dict[str, Future[Curve]] = {kind: self.threads.submit(task) for kind, task in tasks.items()}
        return {kind: curve for kind, run in runs.items() if (curve := run.result())}

    def train_rl(self, name: str, *settings: str) -> Curve:
        """Run rl-tiny. Returns: accuracy over time, also of an interrupted run."""
        run_dir = self.runner.output / name
        try:
            self.runner.run("rl-tiny", name, *settings, *self.settings, minutes=self.minutes)
        except Interrupted:
            if not (run_dir / accuracy.HELD_OUT).is_file():
                return []
        return accuracy.recorded_curve(run_dir)

    def continue_sft(self, name: str, start: Path, *settings: str) -> Curve:
        """Continue the fine-tuning, then evaluate its start checkpoint and some of its own."""
        try:
            run_dir = self.runner.run("sft-tiny", name, *settings, *CONTINUED, minutes=self.minutes)
            minutes_by_checkpoint = {start: 0.0, **accuracy.checkpoints(run_dir, NUM_EVALUATED)}
            tasks = [partial(self.evaluate, c, f"evaluated-{name}-{c.name}") for c in minutes_by_checkpoint]
            futures = [self.threads.submit(task) for task in tasks]
            return [(minutes, run.result()) for minutes, run in zip(minutes_by_checkpoint.values(), futures)]
        except Interrupted:
            return []

    def evaluate(self, checkpoint: Path, name: str) -> float:
        """Return a checkpoint's held-out accuracy, by a run of one step that evaluates before it."""
        # the recipe's learning rate schedule needs more than one step
        rate = ("schedule.style=constant", "schedule.decay_steps=null", "schedule.warmup_steps=0")
        one_step = ("training.steps=1", "rl.held_out_interval_steps=0", *rate)
        run_dir = self.runner.run("rl-tiny", name, override("checkpoint.load", checkpoint), *one_step)
        return accuracy.initial_accuracy(run_dir)


def write_results(output: Path, options: argparse.Namespace, results: dict[str, dict[str, Curve]]) -> None:
    """Write results, table, figure and report of all runs that have results."""
    directories = runs_in(output)
    content = {
        "command": " ".join(["tools/studies/rl_study.py", f"--run-minutes {options.run_minutes:g}", *options.settings]),
        "machine": accuracy.machine(directories[0]),
        "curves": results,
        "costs": {d.name: cost(d) for d in directories},
        "interrupted": [d.name for d in directories if not has_ended(d)],
    }
    (output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    text = accuracy.markdown(content, f"{STUDY}.png")
    (output / "results.md").write_text(text)
    accuracy.plot(output / f"{STUDY}.png", results)
    (output / "report.html").write_text(accuracy.html_report(content, output / f"{STUDY}.png"))
    print(f"\n{text}\nwritten to {output}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
