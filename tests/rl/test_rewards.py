"""Grading: scores of each kind, and that a hanging or crashing grader costs one answer and no more."""

import os
import signal
import time
from typing import Any

import pytest

from megatron_q3n.config import UserError
from megatron_q3n.config.rl import RewardConfig
from megatron_q3n.rl.rewards import Graders
from megatron_q3n.rl.samples import Prompt, Sample

HERE = "tests.rl.test_rewards"


def grade_as_told(answer: str, grading: dict[str, Any]) -> float:
    """Do what the answer says: a grader with every fault there is."""
    if answer == "hang":
        time.sleep(3600)
    if answer == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if answer == "leave":
        os._exit(0)
    if answer == "raise":
        raise RuntimeError("no")
    if answer == "print":
        print('{"score": 99}')
    return float("nan") if answer == "nan" else float(grading["worth"])


def sample_of(text: str, grading: dict[str, Any]) -> Sample:
    return Sample(Prompt(0, [1], grading), 0, [1], [0.0], "stop", 0, text=text)


def scored(settings: RewardConfig, samples: list[Sample]) -> list[tuple[float, str | None]]:
    with Graders(settings) as graders:
        graders.score(samples)
    return [(sample.score, sample.failure) for sample in samples]


def test_a_bad_grader_costs_its_own_answer_only() -> None:
    settings = RewardConfig(
        kind="function", function=f"{HERE}:grade_as_told", time_limit_seconds=1, failed=-1, workers=2
    )
    words = ["fine", "hang", "crash", "leave", "raise", "print", "nan", "fine", "hang", "fine"]
    found = scored(settings, [sample_of(word, {"worth": n}) for n, word in enumerate(words)])
    assert found == [
        (0, None),
        (-1, "time limit"),
        (-1, "crash"),
        (-1, "crash"),
        (-1, "RuntimeError: no"),
        (5, None),
        (-1, "a score of nan"),
        (7, None),
        (-1, "time limit"),
        (9, None),
    ]


def test_task_and_mathematics() -> None:
    grading = {"task": "chain_sum", "settings": {"min_terms": 2, "max_terms": 2}, "seed": 5, "index": 77}
    found = scored(RewardConfig(workers=1), [sample_of(t, grading) for t in ("15061", "15062", "")])
    assert found == [(1, None), (0, None), (0, None)]
    settings = RewardConfig(kind="math_verify", answer_pattern=r"<answer>(.*?)</answer>", failed=-2, workers=1)
    texts = ["<answer>1</answer> or <answer>$0.5$</answer>", "<answer>$2$</answer>", "0.5"]
    found = scored(settings, [sample_of(text, {"answer": r"\frac{1}{2}"}) for text in texts])
    assert found == [(1, None), (0, None), (-2, "no answer found")]


def test_a_function_that_is_not_there_is_named() -> None:
    settings = RewardConfig(kind="function", function=f"{HERE}:nothing", workers=1)
    with pytest.raises(UserError, match="nothing does not start"):
        scored(settings, [sample_of("1", {})])
