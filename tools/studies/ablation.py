#!/usr/bin/env python
"""Ablation studies of recipes/ablation-*.yaml: every variant with every seed, and a comparison of the results.

    tools/studies/ablation.py RECIPE [--seeds 2] [--workers 4] [--minutes 9] [--only none,elementwise] [setting=value …]
    tools/studies/ablation.py --all --workers 6 --minutes 9 --pack studies.tar.xz    all studies, their runs mixed
    tools/studies/ablation.py --all --publish        nothing is run: existing results are written to docs/evidence.md

Settings apply to every run, after the study's own. A run that fails or diverges is a result. After an interruption the
same command continues. A run that several studies share is executed once. Each study writes, in runs/RECIPE (one study:
in --output; several: in --output/RECIPE):

    results.json  results.md  RECIPE.png  comparison.html  VARIANT-seedN/ (a run directory, without checkpoints)

--pack writes the records of all these into one file, from which the rest can be written again; on another machine use
`tar xf FILE -C runs` and --publish.

Exit codes: 0 all runs have ended, with any outcome; 2 refused; 75 some were interrupted.
"""

import argparse
import json
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_q3n.config import EXIT_BAD_INPUT, EXIT_REQUEUE, UserError
from megatron_q3n.data.blend import load_blends
from megatron_q3n.metrics.report import write_comparison
from megatron_q3n.recipe import register_defaults
from tools.studies.ablations import archive, evidence, plots, results
from tools.studies.ablations.outcomes import check_same, outcome_of, record_arguments
from tools.studies.ablations.processes import ROOT
from tools.studies.ablations.recipe import AblationRecipe, Trial, find, list_studies, read, trials
from tools.studies.ablations.runs import TrialRunner
from tools.studies.ablations.schedule import schedule

TABLE, COMPARISON = "results.md", "comparison.html"


@dataclass(frozen=True)
class Study:
    """A requested study: its recipe, its folder and its runs."""

    name: str
    recipe: AblationRecipe
    output: Path
    trials: list[Trial]
    settings: list[str]

    def outcomes(self) -> results.Outcomes:
        """Return the outcomes of the runs that have ended."""
        outcomes = {trial.name: outcome_of(trial) for trial in self.trials}
        return {name: outcome for name, outcome in outcomes.items() if outcome is not None}

    @property
    def command(self) -> str:
        """Return the command that runs the study."""
        return " ".join(["tools/studies/ablation.py", self.name, *self.settings])


def main() -> int:
    """Run the command line. Returns: the exit code."""
    options = parse(sys.argv[1:])
    register_defaults()
    try:
        studies = requested_studies(options)
        if not options.publish:
            run(studies, options)
        if options.pack:
            size = archive.pack(options.pack, [study.output for study in studies])
            print(f"{options.pack}: {size / 2**20:.1f} MiB", flush=True)
        if options.publish:
            publish(studies)
        else:
            for study in studies:
                conclude(study)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    num_left = sum(len(study.trials) - len(study.outcomes()) for study in studies)
    if num_left:
        num_trials = sum(len(study.trials) for study in studies)
        print(f"{num_left} of {num_trials} runs are left: run the same command again", flush=True)
    return EXIT_REQUEUE if num_left and not options.publish else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--all", action="store_true", help="every study of recipes/")
    parser.add_argument("--seeds", type=_positive, help="of each variant; default: the study's")
    parser.add_argument("--workers", type=_positive, default=1, help="runs at once")
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="VARIANT,…")
    parser.add_argument("--minutes", type=float, help="after this time save all runs, and stop")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep checkpoints: gigabytes per run")
    parser.add_argument("--retry", action="store_true", help="repeat failed runs")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write a .tar.xz without weights")
    parser.add_argument("--publish", action="store_true", help="write docs/evidence.md; run nothing")
    parser.add_argument("words", nargs="*", metavar="RECIPE … setting=value …")
    options = parser.parse_intermixed_args(arguments)
    options.settings = [word for word in options.words if "=" in word]
    options.recipes = [word for word in options.words if "=" not in word]
    if options.all == bool(options.recipes):
        parser.error("name studies of recipes/, or use --all")
    return options


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def requested_studies(options: argparse.Namespace) -> list[Study]:
    """Return the studies of a command line, with all runs checked.

    Raises: UserError for a study or run that is not possible.
    """
    paths = [find(name) for name in (list_studies() if options.all else options.recipes)]
    if options.only and len(paths) > 1:
        raise UserError("--only selects variants of one study; name one study.")
    return [_study(path, options, is_only_study=len(paths) == 1) for path in dict.fromkeys(paths)]


def _study(path: Path, options: argparse.Namespace, *, is_only_study: bool) -> Study:
    recipe, folder = read(path), (options.output or ROOT / "runs").resolve()
    output = folder if is_only_study and options.output else folder / path.stem
    seeds = options.seeds or recipe.seeds
    runs = trials(recipe, output, seeds, options.only, options.settings)
    return Study(path.stem, recipe, output, runs, options.settings)


def run(studies: list[Study], options: argparse.Namespace) -> None:
    """Run trials until all have ended, the time is over, or this process gets SIGTERM or SIGINT."""
    for study in studies:
        record_arguments(study.trials)
    runner = TrialRunner(options.workers, options.keep_checkpoints, options.retry)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: runner.stop())
    alarm = threading.Timer(60 * options.minutes, runner.stop) if options.minutes else None
    if alarm:
        alarm.start()
    try:
        configs = [trial.config for study in studies for trial in study.trials]
        for config in {config.data.model_dump_json(): config for config in configs}.values():
            # prepared once, not by every worker
            load_blends(config)
        runner.run(schedule([study.trials for study in studies]))
    finally:
        if alarm:
            alarm.cancel()


def conclude(study: Study) -> dict[str, Any] | None:
    """Write results, table, figure and comparison of the runs that have ended. Returns: the results, if any."""
    outcomes, output = study.outcomes(), study.output
    if not outcomes:
        return None
    summary = results.gather(study.name, study.recipe, study.settings, study.trials, outcomes)
    summary["command"] = study.command
    (output / results.RESULTS).write_text(json.dumps(summary, indent=1) + "\n")
    text = results.markdown(summary, study.command, f"{study.name}.png")
    (output / TABLE).write_text(text)
    runs = results.comparable(study.trials, outcomes)
    by_variant: plots.Runs = {}
    for files in runs:
        by_variant.setdefault(str(files.config["recipe"]), []).append(files)
    if runs:
        measures = list(study.recipe.measures.values())
        plots.draw(output / f"{study.name}.png", study.name, measures, by_variant)
    if len(runs) > 1:
        write_comparison([files.path for files in runs], output / COMPARISON)
    print(f"\n{study.name}\n{text}\nwritten to {output}", flush=True)
    return summary


def publish(studies: list[Study]) -> None:
    """Write the results of studies to docs/evidence.md; studies without a run are skipped.

    Raises: UserError if no study has a run, or runs have other settings.
    """
    published = []
    for study in studies:
        check_same(study.trials)
        summary, picture = conclude(study), study.output / f"{study.name}.png"
        if summary is None or not picture.is_file():
            continue
        text = results.markdown(summary, study.command, evidence.picture_of(study.name))
        evidence.fill(study.name, text, picture)
        published.append(study.name)
    if not published:
        folders = ", ".join(str(study.output) for study in studies)
        raise UserError(f"no run with a curve has ended in {folders}: run the studies first.")
    print(f"{evidence.PAGE}: {', '.join(published)}")


if __name__ == "__main__":
    sys.exit(main())
