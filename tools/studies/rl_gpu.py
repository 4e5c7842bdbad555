#!/usr/bin/env python
"""Study of GSPO and GRPO, with and without routing replay, on one GPU: rewards and training–rollout mismatch.

    tools/studies/rl_gpu.py [--variants gspo-replay,grpo] [--workers 4] [--minutes 9] [--steps 200] [setting=value …]
    tools/studies/rl_gpu.py --publish        runs nothing; writes existing results to docs/evidence.md

A model of 0.26 B parameters is trained from scratch to spell words backward (sft-small-spelling) until its loss on
held-out words is --sft-loss; every variant then runs reinforcement learning (rl-small-spelling) from there, with one
seed and the same prompts, so that all first rollouts are identical. Settings go to every run, --sft and --rl to one
stage. The same command continues a study that was stopped. Writes to --output (runs/rl-gpu):

    results.json  results.md  rl-gpu.png  sft/ gspo-replay/ … (run directories, without checkpoints of RL)

Exit codes: 0 all runs have ended; 2 invalid arguments, or a run failed; 75 some runs were interrupted.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from megatron_q3n.config import EXIT_BAD_INPUT, EXIT_REQUEUE, UserError
from megatron_q3n.config.override_text import override
from tools.studies.ablations import evidence
from tools.studies.ablations.processes import ROOT
from tools.studies.rl_studies import accuracy, mismatch
from tools.studies.rl_studies.runs import Interrupted, RecipeRunner, cost, drop_checkpoints, has_ended, records

STUDY = "rl-gpu"
START = "sft"
VARIANTS = {
    f"{algorithm}{'-replay' if replay else ''}": (
        f"rl.algorithm={algorithm}",
        f"rl.routing_replay={str(replay).lower()}",
    )
    for algorithm in ("gspo", "grpo", "dr_grpo", "dapo")
    for replay in (True, False)
}
DEFAULT_VARIANTS = ("gspo-replay", "grpo", "gspo", "grpo-replay")


def main() -> int:
    """Run the command line."""
    options = parse(sys.argv[1:])
    output = options.output.resolve()
    try:
        if options.publish:
            evidence.publish(STUDY, output, mismatch.markdown)
            return 0
        runner = RecipeRunner(output, options.workers)
        runner.stop_after(options.minutes)
        num_left = run_study(runner, options)
        if any(records(output / name) for name in options.variants):
            write_results(output, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if num_left:
        print(f"{num_left} runs have not ended: repeat the command to continue", flush=True)
    return EXIT_REQUEUE if num_left else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--variants", type=_variants, default=list(DEFAULT_VARIANTS), metavar="NAME,…")
    parser.add_argument("--workers", type=int, default=len(DEFAULT_VARIANTS), help="runs in parallel")
    parser.add_argument("--minutes", type=float, help="time limit of this command; then it saves all runs and stops")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each variant")
    parser.add_argument(
        "--sft-loss", type=float, default=0.8, help="held-out loss at which fine-tuning ends, nats per token"
    )
    for stage in ("sft", "rl"):
        parser.add_argument(
            f"--{stage}",
            action="append",
            default=[],
            metavar="setting=value",
            help=f"a setting of {stage} only; repeatable",
        )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / STUDY)
    parser.add_argument(
        "--keep-checkpoints", action="store_true", help="keep each variant's checkpoints, some gigabytes"
    )
    parser.add_argument("--publish", action="store_true", help="write docs/evidence.md; run nothing")
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    return parser.parse_intermixed_args(arguments)


def _variants(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: choose from {', '.join(VARIANTS)}")
    return names


def run_study(runner: RecipeRunner, options: argparse.Namespace) -> int:
    """Run what has not ended. Returns: the number of runs that have not ended."""
    is_done = partial(has_reached_loss, options.sft_loss)
    try:
        settings = (*options.settings, *options.sft)
        start = runner.run("sft-small-spelling", START, *settings, stop_when=is_done)
    except Interrupted:
        return 1 + len(options.variants)

    def run_variant(name: str) -> int:
        settings = (override("checkpoint.load", start), f"training.steps={options.steps}", *VARIANTS[name])
        try:
            extra = (*options.settings, *options.rl)
            run_dir = runner.run("rl-small-spelling", name, *settings, *extra)
        except Interrupted:
            return 1
        if not options.keep_checkpoints:
            drop_checkpoints(run_dir)
        return 0

    with ThreadPoolExecutor(len(options.variants)) as threads:
        return sum(threads.map(run_variant, options.variants))


def has_reached_loss(target_loss: float, run_dir: Path) -> bool:
    """Return whether the last validation loss of a run is at most the target."""
    losses = [r["loss/validation"] for r in records(run_dir) if "loss/validation" in r]
    return bool(losses) and losses[-1] <= target_loss


def write_results(output: Path, options: argparse.Namespace) -> None:
    """Write results, tables and figure of all runs that have results."""
    runs = {name: records(output / name) for name in options.variants}
    runs = {name: rows for name, rows in runs.items() if rows}
    initial = {name: accuracy.initial_accuracy(output / name) for name in runs}
    arguments = [*(f"{name} {value}" for name, value in _non_default_arguments(options)), *options.settings]
    content = {
        "command": " ".join(["tools/studies/rl_gpu.py", *arguments]),
        "machine": accuracy.machine(output / next(iter(runs))),
        "sft": {"steps": len(records(output / START)), **cost(output / START)},
        "has_ended": {name: has_ended(output / name) for name in runs},
        "cost": {name: cost(output / name) for name in runs},
        "first_rollout": {name: mismatch.first_rollout(rows) for name, rows in runs.items()},
        "whole_run": {name: mismatch.whole_run(rows, initial[name]) for name, rows in runs.items()},
        "records": runs,
    }
    (output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    text = mismatch.markdown(content, f"{STUDY}.png")
    (output / "results.md").write_text(text)
    mismatch.plot(output / f"{STUDY}.png", runs, initial)
    print(f"\n{text}\nwritten to {output}", flush=True)


def _non_default_arguments(options: argparse.Namespace) -> list[tuple[str, object]]:
    arguments: list[tuple[str, object]] = [("--steps", options.steps), ("--sft-loss", options.sft_loss)]
    if options.variants != list(DEFAULT_VARIANTS):
        arguments.append(("--variants", ",".join(options.variants)))
    arguments += [("--sft", setting) for setting in options.sft]
    return arguments + [("--rl", setting) for setting in options.rl]


if __name__ == "__main__":
    sys.exit(main())
