#!/usr/bin/env python
"""Comparison of ways to train the MTP draft layer: same trunk, same tokens, and the acceptance of the drafts.

    tools/studies/compare_mtp.py --output runs/drafts --workers 6 --minutes 5       the trunk first (pretrain-small)
    tools/studies/compare_mtp.py runs/latest --config-name mtp-tiny --output runs/drafts [setting=value …]

Ways: single-step; teacher-forced depths, as megatron-core trains them; and drafting as in decoding
(mtp.method=inference), on labels or distilled from the model, as in the mtp recipes. The trunk is frozen, so the model
that verifies the drafts is the same for all. Acceptance is measured by the evaluate stage on held-out text, with real
drafting and verification. Settings after the options apply to the training of each way; those of --trunk and --evaluate
to these stages. After an interruption the same command continues. Written to --output:

    results.json  results.md  drafts.png  WAY-seedN/ (run directories)  trunk/ (where it was trained here)

Exit codes: 0 all have ended; 2 refused; 75 some are left.
"""

import argparse
import json
import statistics
import sys
import threading
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_q3n.config import EXIT_BAD_INPUT, EXIT_REQUEUE, UserError
from megatron_q3n.config.override_text import override
from megatron_q3n.recipe import configure, register_defaults
from tools.studies.ablations.outcomes import DONE, outcome_of, record_arguments
from tools.studies.ablations.recipe import QUIET, Trial
from tools.studies.ablations.runs import TrialRunner
from tools.studies.ablations.schedule import SharedTrial

DEPTH = 4
RESULTS, TABLE, PICTURE, TRUNK = "results.json", "results.md", "drafts.png", "trunk"
SINGLE = ("model.mtp_num_layers=1", "model.mtp_use_repeated_layer=false")
LABELS = ("mtp.label_weight=1", "mtp.distillation_weight=0")
DISTILLED = ("mtp.label_weight=0", "mtp.distillation_weight=1")
AS_DECODED = "mtp.method=inference"
WAYS: dict[str, tuple[str, ...]] = {
    "single-step": ("mtp.method=stock", *LABELS, *SINGLE),
    "teacher-forced": ("mtp.method=stock", *LABELS),
    "as-decoded": (AS_DECODED, *LABELS),
    "as-decoded-distilled": (AS_DECODED, *DISTILLED),
    "single-step-distilled": (AS_DECODED, *DISTILLED, *SINGLE),
    "as-decoded-all-labels": (AS_DECODED, "mtp.after_wrong_draft=teacher_forcing", *LABELS),
}
USUAL = list(WAYS)[:4]
KINDS = ("greedy", "drawn")
MADE_BY = ("gpu", "git")


@dataclass(frozen=True)
class Way(Trial):
    """Training of a draft layer in one way with a seed, and additional settings of its evaluation."""

    evaluation_settings: tuple[str, ...] = ()

    @property
    def evaluation(self) -> list[str]:
        """Return the command line of the evaluation, in the dtype of the training."""
        source = (override("checkpoint.load", self.run_dir), f"precision={self.config.precision.compute}")
        return [
            "--config-name",
            "evaluate",
            *source,
            f"evaluate.draft_depth={DEPTH}",
            *QUIET,
            *self.evaluation_settings,
        ]


def main() -> int:
    """Train what is left, and write the results. Returns: the exit code."""
    options = parse(sys.argv[1:])
    register_defaults()
    try:
        trunk = trunk_of(options)
        ways = ways_of(options, str(trunk.run_dir) if trunk else options.checkpoint)
        run(trunk, ways, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    conclude(options, trunk, ways)
    left = [way.name for way in ways if outcome_of(way) is None]
    if left:
        print(f"left: {', '.join(left)}; run the same command again", flush=True)
    return EXIT_REQUEUE if left else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--config-name", default="mtp-small", metavar="RECIPE")
    parser.add_argument("--pretrain", default="pretrain-small", metavar="RECIPE", help="the trunk")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=USUAL, metavar="WAY")
    parser.add_argument("--seeds", type=int, default=2, help="of each way")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--minutes", type=float, help="after this time save all runs, and stop")
    for name in ("trunk", "evaluate"):
        parser.add_argument(f"--{name}", nargs="*", default=[], metavar="setting=value")
    parser.add_argument("words", nargs="*", metavar="[RUN_DIR] [setting=value …]")
    options = parser.parse_intermixed_args(arguments)
    options.settings = [word for word in options.words if "=" in word]
    sources = [word for word in options.words if "=" not in word]
    if len(sources) > 1:
        parser.error(f"one trunk for all ways, not {len(sources)}: {' '.join(sources)}")
    options.checkpoint = str(Path(sources[0]).resolve()) if sources else None
    options.output = options.output.resolve()
    return options


def trunk_of(options: argparse.Namespace) -> Trial | None:
    """Return the trunk's training; None if a trained checkpoint is named."""
    if options.checkpoint:
        return None
    arguments = ("--config-name", options.pretrain, *options.trunk)
    config = configure([*arguments, *QUIET])
    return Trial(TRUNK, 1, options.output / TRUNK, arguments, config, is_evaluated=False)


def ways_of(options: argparse.Namespace, trunk: str) -> list[Way]:
    """Return the trainings, all ways of the first seed first."""
    base = ("--config-name", options.config_name, override("checkpoint.load", trunk))
    ways = []
    for seed in range(1, options.seeds + 1):
        for name in options.ways:
            arguments = (*base, *WAYS[name], *options.settings)
            config = configure([*arguments, *QUIET])
            folder, evaluation_settings = options.output / f"{name}-seed{seed}", tuple(options.evaluate)
            ways.append(
                Way(name, seed, folder, arguments, config, is_evaluated=True, evaluation_settings=evaluation_settings)
            )
    return ways


def run(trunk: Trial | None, ways: list[Way], options: argparse.Namespace) -> None:
    """Train the trunk, then the ways, until all have ended or the time is over.

    Raises: UserError if the trunk cannot be trained.
    """
    record_arguments([*([trunk] if trunk else []), *ways])
    runner = TrialRunner(options.workers, keep_checkpoints=True, retry=False)
    alarm = threading.Timer(60 * options.minutes, runner.stop) if options.minutes else None
    if alarm:
        alarm.start()
    try:
        if trunk:
            runner.run([SharedTrial(trunk)])
            ended = outcome_of(trunk)
            if ended is None:
                return
            if ended["ended"] != DONE:
                raise UserError(f"the trunk's training {ended['ended']}: {ended['message']}")
        runner.run([SharedTrial(way) for way in ways])
    finally:
        if alarm:
            alarm.cancel()


def conclude(options: argparse.Namespace, trunk: Trial | None, ways: list[Way]) -> None:
    """Write results, table and figure of the ways that have ended."""
    by_way = {name: gather(name, [w for w in ways if w.variant == name]) for name in options.ways}
    by_way = {name: way for name, way in by_way.items() if way["seeds"]}
    if not by_way:
        return
    config = ways[0].config
    results = {
        "command": "tools/studies/compare_mtp.py " + " ".join(sys.argv[1:]),
        "made_on": made_on(ways),
        "trunk": options.checkpoint or " ".join(trunk.arguments if trunk else ()),
        "trunk_tokens": trunk.config.training.steps * trunk.config.tokens_per_step if trunk else None,
        "tokens": config.training.steps * config.tokens_per_step,
        "ways": by_way,
        "verdict": verdict(by_way),
    }
    text = markdown(results)
    (options.output / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    (options.output / TABLE).write_text(text)
    draw(options.output / PICTURE, by_way)
    print(f"\n{text}\nwritten to {options.output}", flush=True)


def gather(name: str, ways: list[Way]) -> dict[str, Any]:
    """Return the evaluation results of one way over its seeds."""
    seeds = {}
    for way in ways:
        path = way.run_dir / "evaluation.json"
        if (outcome_of(way) or {}).get("ended") == DONE and path.is_file():
            drafts = next(iter(json.loads(path.read_text())["sets"].values()))["drafts"]
            seeds[way.seed] = {kind: drafts[kind]["acceptance"] for kind in KINDS}
    return over_seeds(name, seeds)


def over_seeds(name: str, seeds: dict[int, dict[str, list[float | None]]]) -> dict[str, Any]:
    """Return one way's conditional acceptance by depth, and tokens per pass by number of drafts."""
    way: dict[str, Any] = {"settings": list(WAYS[name]), "seeds": seeds}
    for kind in KINDS if seeds else ():
        shares = [[share or 0.0 for share in seed[kind]] for seed in seeds.values()]
        lengths = [[1 + total for total in accumulate(accumulate(s, mul))] for s in shares]
        way[kind] = {
            "acceptance": [spread(column) for column in zip(*shares)],
            "tokens_per_pass": [spread(column) for column in zip(*lengths)],
        }
    return way


def spread(values: tuple[float, ...]) -> dict[str, float | None]:
    """Return mean and standard deviation over seeds; None as the deviation of a single seed."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": deviation}


def made_on(ways: list[Way]) -> dict[str, Any]:
    """Return the machine of the first run that recorded its environment."""
    for way in ways:
        path = way.run_dir / "environment.json"
        if path.is_file():
            return {name: json.loads(path.read_text()).get(name) for name in MADE_BY}
    return {}


def verdict(by_way: dict[str, Any]) -> dict[str, float]:
    """Compare every way with single-step: tokens per pass at the largest depth, and acceptance at depth 1 in points."""
    if "single-step" not in by_way:
        return {}
    plain, compared = by_way["single-step"]["greedy"], {}
    for name, way in by_way.items():
        if name == "single-step":
            continue
        ours = way["greedy"]
        length, base = (x["tokens_per_pass"][-1]["mean"] for x in (ours, plain))
        compared[f"{name}: tokens per pass at depth {DEPTH}, over single-step's"] = length / base
        first, base = (x["acceptance"][0]["mean"] for x in (ours, plain))
        compared[f"{name}: acceptance at depth 1, points over single-step's"] = 100 * (first - base)
    return compared


def markdown(results: dict[str, Any]) -> str:
    """Return the table, the comparison and the conditions of the measurement as Markdown."""
    depths = range(1, DEPTH + 1)
    head = ["way", "drafts", "runs", *(f"kept at depth {d}" for d in depths)]
    head += [f"tokens per pass, {d} drafted" for d in depths]
    rows = [head, ["---"] * 3 + ["---:"] * (2 * DEPTH)]
    for name, way in results["ways"].items():
        for kind in KINDS:
            shares = [cell(x, 100, "%") for x in way[kind]["acceptance"]]
            lengths = [cell(x, 1, "") for x in way[kind]["tokens_per_pass"]]
            rows.append([name, kind, str(len(way["seeds"])), *shares, *lengths])
    table = [f"| {' | '.join(row)} |" for row in rows]
    comparisons = [f"- {what}: {value:.3f}" for what, value in results["verdict"].items()]
    machine, trunk_tokens = results["made_on"], results["trunk_tokens"]
    facts = (
        f"{results['tokens'] / 1e6:,.3g} M tokens a way, from one trunk ({results['trunk']}"
        f"{f', {trunk_tokens / 1e6:,.3g} M tokens' if trunk_tokens else ''}); mean ± standard deviation over seeds; "
        f"{machine.get('gpu') or 'a CPU'}; commit {machine.get('git') or 'unknown'}; `{results['command']}`"
    )
    return "\n".join([*table, "", *comparisons, "", f"![drafts kept]({PICTURE})", "", facts, ""])


def cell(value: dict[str, float | None], scale: float, unit: str) -> str:
    """Return e.g. "71.3 ± 0.4 %"."""
    places = 1 if unit else 3
    mean, deviation = value["mean"] or 0.0, value["spread"]
    text = f"{scale * mean:.{places}f}"
    text += "" if deviation is None else f" ± {scale * deviation:.{places}f}"
    return f"{text} {unit}".strip()


def draw(path: Path, by_way: dict[str, Any]) -> None:
    """Write the figure: tokens per pass by number of greedy drafts, and acceptance by depth."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {"tokens_per_pass": "tokens per pass, by drafts", "acceptance": "drafts kept, by depth"}
    for axes, (what, title) in zip(panels, titles.items()):
        for name, way in by_way.items():
            points = way["greedy"][what]
            means = [point["mean"] for point in points]
            bars = [point["spread"] or 0.0 for point in points]
            axes.errorbar(range(1, DEPTH + 1), means, bars, marker="o", capsize=3, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(1, DEPTH + 1))
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
