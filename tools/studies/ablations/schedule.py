"""Order of the runs of several studies, and runs that studies share.

Studies have their baseline in common: the same settings and seed give the same numbers. Such a run is executed once,
and its records are copied into the other studies' folders, where each is a run like the others.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field

import yaml

from megatron_q3n.metrics.report.run_files import CONFIG_FILE
from tools.studies.ablations.outcomes import OUTCOME, outcome_of
from tools.studies.ablations.recipe import Trial

# settings in which runs with the same training may differ
OWN_NAMES = ("recipe", "run_dir", "evaluate")


@dataclass
class SharedTrial:
    """A run to execute, and the runs that become copies of it."""

    trial: Trial
    copies: list[Trial] = field(default_factory=list)


def schedule(studies: Sequence[Sequence[Trial]]) -> list[SharedTrial]:
    """Return the runs to execute: every study's first variant with all its seeds, then every study's second, …

    So after an early stop the most informative variants of all studies have results, with their spread.
    """
    ranked = [
        (list(dict.fromkeys(t.variant for t in trials)).index(trial.variant), number, trial.seed, trial)
        for number, trials in enumerate(studies)
        for trial in trials
    ]
    queue: dict[str, SharedTrial] = {}
    for *_, trial in sorted(ranked, key=lambda row: row[:3]):
        shared = queue.setdefault(_identity(trial, queue), SharedTrial(trial))
        if shared.trial is not trial:
            _join(shared, trial)
    return list(queue.values())


def _identity(trial: Trial, queue: dict[str, SharedTrial]) -> str:
    """Return a key that equal runs share; runs with different evaluations are not equal."""
    tree = trial.config.model_dump(mode="json", exclude=set(OWN_NAMES))
    tree["training"]["seed"] = trial.seed
    key = json.dumps(tree, sort_keys=True)
    queued = queue.get(key)
    if queued is None or not (trial.is_evaluated and _is_evaluated(queued)):
        return key
    is_same = queued.trial.config.evaluate == trial.config.evaluate
    return key if is_same else f"{key} {trial.run_dir}"


def _is_evaluated(shared: SharedTrial) -> bool:
    return any(trial.is_evaluated for trial in (shared.trial, *shared.copies))


def _join(shared: SharedTrial, trial: Trial) -> None:
    """Add a trial. The one to execute is an evaluated one, if any, and among these one that has an outcome."""
    every = [shared.trial, *shared.copies, trial]
    first = min(every, key=lambda t: (not t.is_evaluated, outcome_of(t) is None))
    shared.trial, shared.copies = first, [t for t in every if t is not first]


def copy_run(source: Trial, copy: Trial) -> None:
    """Copy a finished run into another study, without its checkpoints, under its name there."""
    ignored = shutil.ignore_patterns("checkpoints", "wandb", "*.html", OUTCOME)
    shutil.copytree(source.run_dir, copy.run_dir, ignore=ignored, dirs_exist_ok=True)
    path = copy.run_dir / CONFIG_FILE
    if path.is_file():
        config = yaml.safe_load(path.read_text()) | {"recipe": copy.variant, "run_dir": str(copy.run_dir)}
        path.write_text(yaml.safe_dump(config, sort_keys=False))
    outcome = outcome_of(source) or {}
    outcome["shared_with"] = f"{source.run_dir.parent.name}/{source.name}"
    (copy.run_dir / OUTCOME).write_text(json.dumps(outcome, indent=1) + "\n")
