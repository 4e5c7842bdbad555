"""Results of a study: every number by variant and seed, mean and spread, and the Markdown table.

Spread is the sample standard deviation over seeds. The numbers of a diverged run are included; a failed run has none.
Structure of results.json: `variants` -> variant -> `measures` -> heading -> mean, spread, values.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_q3n.config.sizes import parameters
from megatron_q3n.metrics.report.run_files import RunFiles, load
from tools.studies.ablations.measures import Measure
from tools.studies.ablations.outcomes import FAILED
from tools.studies.ablations.recipe import AblationRecipe, Trial

RESULTS = "results.json"
NOTHING = "–"
# name of a trial -> its outcome
Outcomes = dict[str, dict[str, Any]]


def gather(
    study: str, recipe: AblationRecipe, settings: list[str], trials: list[Trial], outcomes: Outcomes
) -> dict[str, Any]:
    """Return the contents of results.json, for the trials that have an outcome."""
    ended = [trial for trial in trials if trial.name in outcomes]
    numbers = {trial.name: _numbers(trial, outcomes, recipe.measures) for trial in ended}
    results: dict[str, Any] = {
        "study": study,
        **recipe.model_dump(include={"question", "claim", "source", "base", "common", "compare"}),
        "settings": settings,
        "steps": ended[0].config.training.steps,
        "tokens_per_step": ended[0].config.tokens_per_step,
        "made_on": _machine(ended),
        "variants": {},
        "runs": {trial.name: outcomes[trial.name] | {"seed": trial.seed} for trial in ended},
    }
    for variant in dict.fromkeys(trial.variant for trial in ended):
        variant_trials = [trial for trial in ended if trial.variant == variant]
        count = parameters(variant_trials[0].config.model)
        results["variants"][variant] = {
            "overrides": recipe.variants[variant],
            "parameters": count.total_with_mtp,
            "active_parameters": count.active_with_embeddings,
            "ended": dict(Counter(outcomes[trial.name]["ended"] for trial in variant_trials)),
            "measures": {
                heading: _over_seeds({trial.seed: numbers[trial.name][heading] for trial in variant_trials})
                for heading in recipe.compare
            },
        }
    return results


def _numbers(trial: Trial, outcomes: Outcomes, measures: dict[str, Measure]) -> dict[str, float | None]:
    if outcomes[trial.name]["ended"] == FAILED:
        return dict.fromkeys(measures)
    run = load(trial.run_dir)
    return {heading: measure.of(run) for heading, measure in measures.items()}


def _over_seeds(values: dict[int, float | None]) -> dict[str, Any]:
    present = [value for value in values.values() if value is not None]
    return {
        "mean": statistics.fmean(present) if present else None,
        "spread": statistics.stdev(present) if len(present) > 1 else None,
        "values": values,
    }


def _machine(ended: list[Trial]) -> dict[str, Any]:
    """Return the machine of the first run that recorded its environment."""
    for trial in ended:
        environment = _environment(trial.run_dir)
        if environment:
            packages = environment.get("packages", {})
            names = ("torch", "megatron-core", "transformer-engine")
            kept = {name: packages.get(name) for name in names if packages.get(name)}
            return {k: environment.get(k) for k in ("started", "gpu", "git")} | {"packages": kept}
    return {}


def _environment(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "environment.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def markdown(results: dict[str, Any], command: str, picture: str) -> str:
    """Return the table, the figure and the conditions of the measurement as Markdown."""
    headings = list(results["compare"])
    rows = [["variant", "runs", *headings], ["---", "---", *["---:"] * len(headings)]]
    for name, variant in results["variants"].items():
        cells = [cell(variant["measures"][heading]) for heading in headings]
        rows.append([name, _ended(variant["ended"]), *cells])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    tokens = results["steps"] * results["tokens_per_step"]
    machine = results["made_on"]
    device = machine.get("gpu") or "a CPU"
    facts = (
        f"{results['steps']:,} steps, {tokens / 1e6:,.3g} M tokens a run; mean ± standard deviation over seeds; "
        f"{device}; commit {machine.get('git') or 'unknown'}; `{command}`"
    )
    return "\n".join([*lines, "", f"![{results['study']}]({picture})", "", facts, ""])


def cell(value: dict[str, Any]) -> str:
    """Return e.g. "2.315 ± 0.004": the spread with two digits, the mean with as many places."""
    mean, spread = value["mean"], value["spread"]
    if mean is None:
        return NOTHING
    if not spread:
        return f"{mean:,.4g}" if abs(mean) < 10_000 else f"{mean:,.0f}"
    places = max(0, 1 - math.floor(math.log10(spread)))
    return f"{mean:,.{places}f} ± {spread:,.{places}f}"


def _ended(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {how}" for how, number in counts.items())


def comparable(trials: Iterable[Trial], outcomes: Outcomes) -> list[RunFiles]:
    """Return the run files of the trials that have curves."""
    ended = [t for t in trials if outcomes.get(t.name, {}).get("ended", FAILED) != FAILED]
    return [load(trial.run_dir) for trial in ended]
