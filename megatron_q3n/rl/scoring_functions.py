"""Scoring functions (verifiers): reasoning-gym's own score, math-verify's comparison, or a user's function.

They run in scoring worker processes (scoring_worker.py), one response at a time, so that one may hang or crash. Each
takes the response's text and the prompt's scoring arguments, and returns a number.
"""

import importlib
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import math_verify
import reasoning_gym

ScoringFunction = Callable[[str, dict[str, Any]], float]
# entries of a task set; they are made one by one when they are requested
NUM_ENTRIES = 2**20


def scoring_function(kind: str, function: str | None) -> ScoringFunction:
    """Return the scoring function of a kind ("task", "math_verify", "function"), the last by its import path.

    Raises: ImportError or AttributeError if a user's function does not exist.
    """
    if kind == "task":
        return score_task
    if kind == "math_verify":
        return score_mathematics
    assert function is not None, "RewardConfig validates it"
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def score_task(answer: str, arguments: dict[str, Any]) -> float:
    """Return reasoning-gym's score of an answer to entry `index` of the task set made with `seed`."""
    settings = json.dumps(arguments["settings"], sort_keys=True)
    task = _task(arguments["task"], settings, arguments["seed"])
    return float(task.score_answer(answer, task[arguments["index"]]))


def score_mathematics(answer: str, arguments: dict[str, Any]) -> float:
    """Return 1 if an answer is mathematically equal to the correct one, otherwise 0."""
    correct = math_verify.parse(f"${arguments['answer']}$")
    return float(bool(math_verify.verify(correct, math_verify.parse(answer))))


@lru_cache(maxsize=64)
def _task(name: str, settings: str, seed: int) -> Any:
    return reasoning_gym.create_dataset(name, seed=seed, size=NUM_ENTRIES, **json.loads(settings))
