#!/usr/bin/env python
"""GSPO and GRPO, each with and without routing replay, on one GPU: reward, and how far rollout and trainer are apart.

    tools/studies/rl_gpu.py [--variants gspo-replay,grpo] [--workers 4] [--minutes 9] [--steps 200] [setting=value …]
    tools/studies/rl_gpu.py --publish        nothing is run: what is there goes into docs/evidence.md

One model of 0.26 B parameters is taught to spell words backward from nothing (sft-small-spelling) until its loss on
held-out words is --sft-loss; from there every variant learns from reward (rl-small-spelling), with one seed and the
same prompts, so that all first rollouts are the same answers. Settings are those of every run, --sft and --rl those of
one stage. A study that was stopped goes on by the same command. Leaves in --output (runs/rl-gpu):

    results.json  results.md  rl-gpu.png  sft/ gspo-replay/ … (run directories, without checkpoints of RL)

Exit codes: 0 all runs have ended; 2 refused, or a run failed; 75 some were interrupted.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from megatron_q3n.config import EXIT_BAD_INPUT, EXIT_REQUEUE, UserError
from tools.studies.ablations import evidence
from tools.studies.ablations.processes import ROOT
from tools.studies.rl_studies import accuracy, mismatch
from tools.studies.rl_studies.runs import Bench, Interrupted, cost, drop_checkpoints, has_ended, records

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
CHOSEN = ("gspo-replay", "grpo", "gspo", "grpo-replay")


def main() -> int:
    """Run the command line."""
    options = parse(sys.argv[1:])
    output = options.output.resolve()
    try:
        if options.publish:
            evidence.publish(STUDY, output, mismatch.markdown)
            return 0
        bench = Bench(output, options.workers)
        bench.stop_in(options.minutes)
        left = study(bench, options)
        if any(records(output / name) for name in options.variants):
            conclude(output, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if left:
        print(f"{left} runs are left: give the same command again", flush=True)
    return EXIT_REQUEUE if left else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--variants", type=_variants, default=list(CHOSEN), metavar="NAME,…")
    parser.add_argument("--workers", type=int, default=len(CHOSEN), help="runs at once")
    parser.add_argument("--minutes", type=float, help="then save what runs, and stop")
    parser.add_argument("--steps", type=int, default=200, help="updates of each variant")
    parser.add_argument("--sft-loss", type=float, default=0.8, help="nats a token, held out")
    for stage in ("sft", "rl"):
        parser.add_argument(
            f"--{stage}",
            action="append",
            default=[],
            metavar="setting=value",
            help=f"a setting of {stage} alone; repeatable",
        )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / STUDY)
    parser.add_argument("--keep-checkpoints", action="store_true", help="gigabytes a variant")
    parser.add_argument("--publish", action="store_true", help="write docs/evidence.md; run nothing")
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    return parser.parse_intermixed_args(arguments)


def _variants(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: choose of {', '.join(VARIANTS)}")
    return names


def study(bench: Bench, options: argparse.Namespace) -> int:
    """Run what has not ended. Returns: how many runs are left."""
    learnt = partial(is_learnt, options.sft_loss)
    try:
        settings = (*options.settings, *options.sft)
        start = bench.run("sft-small-spelling", START, *settings, enough=learnt)
    except Interrupted:
        return 1 + len(options.variants)

    def variant(name: str) -> int:
        settings = (f"checkpoint.load={start}", f"training.steps={options.steps}", *VARIANTS[name])
        try:
            more = (*options.settings, *options.rl)
            run_dir = bench.run("rl-small-spelling", name, *settings, *more)
        except Interrupted:
            return 1
        if not options.keep_checkpoints:
            drop_checkpoints(run_dir)
        return 0

    with ThreadPoolExecutor(len(options.variants)) as threads:
        return sum(threads.map(variant, options.variants))


def is_learnt(wanted_loss: float, run_dir: Path) -> bool:
    """Say whether the last validation of a run is as good as wanted."""
    losses = [r["loss/validation"] for r in records(run_dir) if "loss/validation" in r]
    return bool(losses) and losses[-1] <= wanted_loss


def conclude(output: Path, options: argparse.Namespace) -> None:
    """Write results, tables and picture of what there is."""
    runs = {name: records(output / name) for name in options.variants}
    runs = {name: rows for name, rows in runs.items() if rows}
    before = {name: accuracy.before(output / name) for name in runs}
    arguments = [*(f"{name} {value}" for name, value in _said(options)), *options.settings]
    found = {
        "command": " ".join(["tools/studies/rl_gpu.py", *arguments]),
        "machine": accuracy.machine(output / next(iter(runs))),
        "sft": {"steps": len(records(output / START)), **cost(output / START)},
        "has_ended": {name: has_ended(output / name) for name in runs},
        "cost": {name: cost(output / name) for name in runs},
        "first_rollout": {name: mismatch.first(rows) for name, rows in runs.items()},
        "whole_run": {name: mismatch.whole(rows, before[name]) for name, rows in runs.items()},
        "records": runs,
    }
    (output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    text = mismatch.markdown(found, f"{STUDY}.png")
    (output / "results.md").write_text(text)
    mismatch.draw(output / f"{STUDY}.png", runs, before)
    print(f"\n{text}\nleft in {output}", flush=True)


def _said(options: argparse.Namespace) -> list[tuple[str, object]]:
    said = [("--steps", options.steps), ("--sft-loss", options.sft_loss)]
    if options.variants != list(CHOSEN):
        said.append(("--variants", ",".join(options.variants)))
    said += [("--sft", setting) for setting in options.sft]
    return said + [("--rl", setting) for setting in options.rl]


if __name__ == "__main__":
    sys.exit(main())
