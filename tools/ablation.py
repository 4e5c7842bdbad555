#!/usr/bin/env python
"""Run a study of recipes/ablation-*.yaml: every variant with every seed, and what came of it, side by side.

    tools/ablation.py ablation-gate [--seeds 2] [--workers 4] [--minutes 9] [--only none,elementwise] [setting=value …]
    tools/ablation.py ablation-gate --publish        nothing is run: what is there goes into docs/evidence.md

Settings are those of every run, behind the study's own. A run that fails or diverges is a result. The study goes on
where it was interrupted: give the same command again. Leaves in --output (runs/RECIPE):

    results.json  results.md  RECIPE.png  comparison.html  VARIANT-seedN/ (a run directory, without checkpoints)

Exit codes: 0 all runs have ended, in whatever way; 2 refused; 75 some were interrupted.
"""

import argparse
import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ablations import evidence, plots, results
from ablations.recipe import AblationRecipe, Trial, find, read, trials
from ablations.runs import ROOT, Bench

from megatron_q3n import train
from megatron_q3n.config import EXIT_BAD_INPUT, EXIT_REQUEUE, UserError
from megatron_q3n.data.blend import load_blends
from megatron_q3n.metrics.report import write_comparison

TABLE, COMPARISON = "results.md", "comparison.html"


def main() -> int:
    """Run the command line."""
    options = parse(sys.argv[1:])
    train.register_defaults()
    try:
        path = find(options.recipe)
        recipe, study = read(path), path.stem
        output = (options.output or ROOT / "runs" / study).resolve()
        if options.publish:
            publish(study, output)
            return 0
        asked = trials(
            recipe, output, options.seeds or recipe.seeds, options.only, options.settings
        )
        for data in {trial.config.data.model_dump_json(): trial.config for trial in asked}.values():
            load_blends(data)  # prepared once, not by every worker
        bench = Bench(output, options.workers, options.keep_checkpoints, options.retry)
        ended = run(bench, asked, options.minutes)
        outcomes = {t.name: outcome for t, outcome in zip(asked, ended) if outcome is not None}
        if outcomes:
            conclude(study, recipe, options, output, asked, outcomes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    left = len(asked) - len(outcomes)
    if left:
        print(f"{left} of {len(asked)} runs are left: give the same command again", flush=True)
    return EXIT_REQUEUE if left else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a study of recipes/, or a .yaml file")
    parser.add_argument("--seeds", type=_positive, help="of each variant; else the study's own")
    parser.add_argument("--workers", type=_positive, default=1, help="runs at once")
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=[], metavar="VARIANT,…"
    )
    parser.add_argument("--minutes", type=float, help="then save what runs, and stop")
    parser.add_argument("--keep-checkpoints", action="store_true", help="gigabytes a run")
    parser.add_argument("--retry", action="store_true", help="begin runs that failed anew")
    parser.add_argument(
        "--publish", action="store_true", help="write docs/evidence.md; run nothing"
    )
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    return parser.parse_intermixed_args(arguments)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def run(bench: Bench, asked: list[Trial], minutes: float | None) -> list[dict[str, Any] | None]:
    """Run trials until all are done, the time is over, or this process is told to stop."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: bench.stop())
    alarm = threading.Timer(60 * minutes, bench.stop) if minutes else None
    if alarm:
        alarm.start()
    try:
        return bench.run(asked)
    finally:
        if alarm:
            alarm.cancel()


def conclude(
    study: str,
    recipe: AblationRecipe,
    options: argparse.Namespace,
    output: Path,
    asked: list[Trial],
    outcomes: results.Outcomes,
) -> None:
    """Write results, table, picture and comparison of the runs there are."""
    found = results.gather(study, recipe, options.settings, asked, outcomes)
    found["command"] = " ".join(["tools/ablation.py", options.recipe, *options.settings])
    (output / results.RESULTS).write_text(json.dumps(found, indent=1) + "\n")
    text = results.markdown(found, found["command"], f"{study}.png")
    (output / TABLE).write_text(text)
    runs = results.comparable(asked, outcomes)
    by_variant: plots.Runs = {}
    for files in runs:
        by_variant.setdefault(str(files.config["recipe"]), []).append(files)
    if runs:
        plots.draw(output / f"{study}.png", study, list(recipe.measures.values()), by_variant)
    if len(runs) > 1:
        write_comparison([files.path for files in runs], output / COMPARISON)
    print(f"\n{text}\nleft in {output}", flush=True)


def publish(study: str, output: Path) -> None:
    """Put the results of a study into docs/evidence.md.

    Raises: UserError if there are none.
    """
    path, picture = output / results.RESULTS, output / f"{study}.png"
    if not (path.is_file() and picture.is_file()):
        raise UserError(f"{output} holds no {path.name} with {picture.name}: run the study first.")
    found = json.loads(path.read_text())
    text = results.markdown(found, found["command"], evidence.picture_of(study))
    evidence.fill(study, text, picture)
    print(evidence.PAGE)


if __name__ == "__main__":
    sys.exit(main())
