"""Scoring functions (verifiers): reasoning-gym's own score, math-verify's comparison, or a user's function.

They run in scoring worker processes (scoring_worker.py), one response at a time, so that one may hang or crash. Each
takes the answer and the prompt's scoring arguments, and returns a number.
"""

import importlib
import json
import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import math_verify
import reasoning_gym

ScoringFunction = Callable[[str, dict[str, Any]], float]
# entries of a task set; they are made one by one when they are requested
NUM_ENTRIES = 2**20
# what math-verify reads as LaTeX wherever it stands in a text; an escaped dollar is a currency
_LATEX_ENVIRONMENT = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed|\\begin\{")
# two letters in a row that are no command: a text is searched, where a single expression would be read as a whole
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2}")


class UnreadableAnswer(Exception):
    """The correct answer of a prompt cannot be read, so no response to it can be scored."""


def scoring_function(kind: str, function: str | None, *, is_extracted: bool) -> ScoringFunction:
    """Return the scoring function of a kind ("task", "math_verify", "function"), the last by its import path.

    `is_extracted`: answers are matches of `rl.reward.answer_pattern`, not whole texts.
    Raises: ImportError or AttributeError if a user's function does not exist.
    """
    if kind == "task":
        return score_task
    if kind == "math_verify":
        return partial(score_mathematics, is_extracted=is_extracted)
    assert function is not None, "RewardConfig validates it"
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def prepare(kind: str, arguments: dict[str, Any]) -> None:
    """Build the task set of a prompt, which every response to it needs, before the process of one response begins."""
    if kind == "task":
        _task(arguments["task"], json.dumps(arguments["settings"], sort_keys=True), arguments["seed"])


def score_task(answer: str, arguments: dict[str, Any]) -> float:
    """Return reasoning-gym's score of an answer to entry `index` of the task set made with `seed`."""
    settings = json.dumps(arguments["settings"], sort_keys=True)
    task = _task(arguments["task"], settings, arguments["seed"])
    return float(task.score_answer(answer, task[arguments["index"]]))


def score_mathematics(answer: str, arguments: dict[str, Any], *, is_extracted: bool) -> float:
    """Return 1 if an answer is mathematically equal to the correct one, otherwise 0.

    The correct answer and one that a pattern extracted are expressions, and read by the same rules. So is a text
    without words; in other texts, math-verify searches for the expression.
    Raises: UnreadableAnswer if the correct answer is no expression.
    """
    correct = _expression(str(arguments["answer"]))
    if not any(not isinstance(value, str) for value in correct):
        raise UnreadableAnswer(f"the correct answer {arguments['answer']!r} cannot be read as mathematics")
    is_expression = is_extracted or _WORD.search(answer) is None
    found = _expression(answer) if is_expression else math_verify.parse(answer)
    return float(bool(math_verify.verify(correct, found)))


def _expression(text: str) -> list[Any]:
    """Read a text that is one expression, with or without the marks of LaTeX around it."""
    text = text.strip()
    return math_verify.parse(text if _LATEX_ENVIRONMENT.search(text) else f"${text}$")


@lru_cache(maxsize=64)
def _task(name: str, settings: str, seed: int) -> Any:
    return reasoning_gym.create_dataset(name, seed=seed, size=NUM_ENTRIES, **json.loads(settings))
