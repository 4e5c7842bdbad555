"""What an answer is worth: reasoning-gym's own score, math-verify's comparison, or a function of the user's.

Runs in grading processes (`grading_process.py`), one answer at a time, so a grader may hang or crash. Each is
told the answer's text and what the prompt's source said of it ("grading"), and returns a number.
"""

import importlib
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import math_verify
import reasoning_gym

Grader = Callable[[str, dict[str, Any]], float]
ENTRIES = 2**20  # of a task set, made one by one when asked for


def grader_named(kind: str, function: str | None) -> Grader:
    """Return the grader of a kind ("task", "math_verify", "function"), the last by its import path.

    Raises: ImportError or AttributeError if a user's function is not there.
    """
    if kind == "task":
        return score_task
    if kind == "math_verify":
        return score_mathematics
    assert function is not None, "the configuration sees to it"
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def score_task(answer: str, grading: dict[str, Any]) -> float:
    """Return reasoning-gym's score of an answer to entry `index` of the task set made with `seed`."""
    settings = json.dumps(grading["settings"], sort_keys=True)
    task = _task(grading["task"], settings, grading["seed"])
    return float(task.score_answer(answer, task[grading["index"]]))


def score_mathematics(answer: str, grading: dict[str, Any]) -> float:
    """Return 1 if an answer means the same as the right one, else 0."""
    right = math_verify.parse(f"${grading['answer']}$")
    return float(bool(math_verify.verify(right, math_verify.parse(answer))))


@lru_cache(maxsize=64)
def _task(name: str, settings: str, seed: int) -> Any:
    return reasoning_gym.create_dataset(name, seed=seed, size=ENTRIES, **json.loads(settings))
