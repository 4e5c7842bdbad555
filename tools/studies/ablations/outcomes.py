"""Records of a study's runs on disk: the arguments of each, and its outcome."""

import json
from collections.abc import Sequence
from typing import Any

from megatron_q3n.config import UserError
from tools.studies.ablations.recipe import Trial

OUTCOME = "trial.json"
STUDY = "study.json"
DONE, DIVERGED, FAILED, NOT_EVALUATED = "done", "diverged", "failed", "not evaluated"


def outcome_of(trial: Trial) -> dict[str, Any] | None:
    """Return the outcome of a run; None if it has not ended."""
    path = trial.run_dir / OUTCOME
    outcome: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return outcome


def check_same(trials: Sequence[Trial]) -> dict[str, list[str]]:
    """Return {run name: arguments} of the runs in a study's folder, including the new ones.

    Raises: UserError if a run of that name has other arguments.
    """
    path = trials[0].run_dir.parent / STUDY
    recorded: dict[str, list[str]] = json.loads(path.read_text()) if path.is_file() else {}
    for trial in trials:
        before = recorded.setdefault(trial.name, list(trial.arguments))
        if before != list(trial.arguments):
            raise UserError(
                f"{trial.run_dir} was run with {' '.join(before)}, which differs from the requested "
                f"{' '.join(trial.arguments)}. Choose another --output, or delete it and its line in {path}."
            )
    return recorded


def record_arguments(trials: Sequence[Trial]) -> None:
    """Write the arguments of each run of a study to study.json.

    Raises: UserError if a run of that name has other arguments.
    """
    recorded, output = check_same(trials), trials[0].run_dir.parent
    output.mkdir(parents=True, exist_ok=True)
    (output / STUDY).write_text(json.dumps(recorded, indent=1) + "\n")
