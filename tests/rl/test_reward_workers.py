"""Reward workers: scores of each kind, and that a hanging or crashing scoring function fails only its own response."""

import os
import signal
import time
from typing import Any

import pytest

from megatron_q3n.config import UserError
from megatron_q3n.config.rl import RewardConfig
from megatron_q3n.rl.reward_workers import RewardWorkers
from megatron_q3n.rl.samples import Prompt, Sample

HERE = "tests.rl.test_reward_workers"


def score_with_fault(answer: str, arguments: dict[str, Any]) -> float:
    """Fail in the way that the answer names, otherwise return the score in the arguments."""
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
    return float("nan") if answer == "nan" else float(arguments["value"])


def sample_of(text: str, arguments: dict[str, Any]) -> Sample:
    return Sample(Prompt(0, [1], arguments), 0, [1], [0.0], "stop", 0, text=text)


def scored(settings: RewardConfig, samples: list[Sample]) -> list[tuple[float, str | None]]:
    with RewardWorkers(settings) as workers:
        workers.score(samples)
    return [(sample.score, sample.failure) for sample in samples]


def test_a_failing_scoring_function_affects_its_own_response_only() -> None:
    settings = RewardConfig(
        kind="function", function=f"{HERE}:score_with_fault", time_limit_seconds=1, failure_score=-1, workers=2
    )
    answers = ["fine", "hang", "crash", "leave", "raise", "print", "nan", "fine", "hang", "fine"]
    results = scored(settings, [sample_of(answer, {"value": n}) for n, answer in enumerate(answers)])
    assert results == [
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


def test_task_and_math_verify_scores() -> None:
    arguments = {"task": "chain_sum", "settings": {"min_terms": 2, "max_terms": 2}, "seed": 5, "index": 77}
    results = scored(RewardConfig(workers=1), [sample_of(t, arguments) for t in ("15061", "15062", "")])
    assert results == [(1, None), (0, None), (0, None)]
    settings = RewardConfig(kind="math_verify", answer_pattern=r"<answer>(.*?)</answer>", failure_score=-2, workers=1)
    texts = ["<answer>1</answer> or <answer>$0.5$</answer>", "<answer>$2$</answer>", "0.5"]
    results = scored(settings, [sample_of(text, {"answer": r"\frac{1}{2}"}) for text in texts])
    assert results == [(1, None), (0, None), (-2, "no answer found")]


def test_a_missing_scoring_function_is_named_in_the_error() -> None:
    settings = RewardConfig(kind="function", function=f"{HERE}:nothing", workers=1)
    with pytest.raises(UserError, match="nothing does not start"):
        scored(settings, [sample_of("1", {})])
