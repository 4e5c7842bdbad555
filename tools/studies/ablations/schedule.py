"""In which order the runs of several studies go, and which of them are one run.

Studies share their plain model: the same settings and seed in two of them are the same numbers. It is trained once,
and its records are copied into the other studies' folders, where each looks like any run of that study.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field

import yaml

from megatron_q3n.metrics.report.run_files import CONFIG_FILE
from tools.studies.ablations.outcomes import OUTCOME, outcome_of
from tools.studies.ablations.recipe import Trial

OWN_NAMES = ("recipe", "run_dir", "evaluate")  # sections in which runs that share their training may differ


@dataclass
class Shared:
    """A run to make, and those that are copies of it."""

    trial: Trial
    twins: list[Trial] = field(default_factory=list)


def schedule(studies: Sequence[Sequence[Trial]]) -> list[Shared]:
    """Return the runs to make: every study's first variant with all its seeds, then every study's second, …

    So a bench that is stopped has the most telling variants of all studies, with their spread.
    """
    ranked = [
        (list(dict.fromkeys(t.variant for t in trials)).index(trial.variant), number, trial.seed, trial)
        for number, trials in enumerate(studies)
        for trial in trials
    ]
    queue: dict[str, Shared] = {}
    for *_, trial in sorted(ranked, key=lambda row: row[:3]):
        shared = queue.setdefault(_identity(trial, queue), Shared(trial))
        if shared.trial is not trial:
            _join(shared, trial)
    return list(queue.values())


def _identity(trial: Trial, queue: dict[str, Shared]) -> str:
    """Return what a run is made of; runs that are evaluated differently are not the same."""
    tree = trial.config.model_dump(mode="json", exclude=set(OWN_NAMES))
    tree["training"]["seed"] = trial.seed
    key = json.dumps(tree, sort_keys=True)
    there = queue.get(key)
    if there is None or not (trial.is_evaluated and _evaluated(there)):
        return key
    same = there.trial.config.evaluate == trial.config.evaluate
    return key if same else f"{key} {trial.run_dir}"


def _evaluated(shared: Shared) -> bool:
    return any(trial.is_evaluated for trial in (shared.trial, *shared.twins))


def _join(shared: Shared, trial: Trial) -> None:
    """Add a trial. The one to run is one that ran before, or else is evaluated: the others get less, never more."""
    every = [shared.trial, *shared.twins, trial]
    first = min(every, key=lambda t: (not t.is_evaluated, outcome_of(t) is None))
    shared.trial, shared.twins = first, [t for t in every if t is not first]


def hand_on(source: Trial, twin: Trial) -> None:
    """Copy a run that has ended into another study, without its checkpoints, under the name it has there."""
    kept = shutil.ignore_patterns("checkpoints", "wandb", "*.html", OUTCOME)
    shutil.copytree(source.run_dir, twin.run_dir, ignore=kept, dirs_exist_ok=True)
    path = twin.run_dir / CONFIG_FILE
    if path.is_file():
        config = yaml.safe_load(path.read_text()) | {"recipe": twin.variant, "run_dir": str(twin.run_dir)}
        path.write_text(yaml.safe_dump(config, sort_keys=False))
    outcome = outcome_of(source) or {}
    outcome["shared_with"] = f"{source.run_dir.parent.name}/{source.name}"
    (twin.run_dir / OUTCOME).write_text(json.dumps(outcome, indent=1) + "\n")
