"""What is on disk of a study's runs: what each was made of, and how it ended."""

import json
from collections.abc import Sequence
from typing import Any

from megatron_q3n.config import UserError
from tools.studies.ablations.recipe import Trial

OUTCOME = "trial.json"
STUDY = "study.json"
DONE, DIVERGED, FAILED, NOT_EVALUATED = "done", "diverged", "failed", "not evaluated"


def outcome_of(trial: Trial) -> dict[str, Any] | None:
    """Return how a run ended; None where it has not."""
    path = trial.run_dir / OUTCOME
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return found


def check_same(trials: Sequence[Trial]) -> dict[str, list[str]]:
    """Return what the runs of a study's folder were made of, by name, those to come too.

    Raises: UserError if a run of that name was made of something else.
    """
    path = trials[0].run_dir.parent / STUDY
    known: dict[str, list[str]] = json.loads(path.read_text()) if path.is_file() else {}
    for trial in trials:
        before = known.setdefault(trial.name, list(trial.arguments))
        if before != list(trial.arguments):
            raise UserError(
                f"{trial.run_dir} was run with {' '.join(before)}, which is not what is asked now: "
                f"{' '.join(trial.arguments)}. Choose another --output, or delete it and its line in {path}."
            )
    return known


def remember(trials: Sequence[Trial]) -> None:
    """Write down what each run of a study is made of.

    Raises: UserError if a run of that name was made of something else.
    """
    known, output = check_same(trials), trials[0].run_dir.parent
    output.mkdir(parents=True, exist_ok=True)
    (output / STUDY).write_text(json.dumps(known, indent=1) + "\n")
