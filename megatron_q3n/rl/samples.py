"""Prompts and samples: the data that passes through every phase of the reinforcement learning loop.

Shapes: N samples.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

# the reason of a response without an answer: it has the failure score, and is trained on
NO_ANSWER = "no answer found"


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt with its number in the run; `scoring_arguments` (JSON values) go to the scoring function."""

    number: int
    tokens: list[int]
    scoring_arguments: dict[str, Any]


@dataclass
class Sample:
    """One response to a prompt.

    `member` is its index in the prompt's group.
    `logprobs` are the log-probs (nats) under the distribution that its tokens were sampled from.
    `policy_version` is the optimizer step of the weights that generated it.
    `routes` are the experts of every token except the last one, which is never an input: uint16
        [prompt + response - 1 tokens, layers, experts per token].
    `score` is the scoring function's result, or `rl.reward.failure_score`, with the reason in `failure`.
    `reward` is the score plus penalties; the advantage is computed from it.
    """

    prompt: Prompt
    member: int
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    policy_version: int
    routes: np.ndarray | None = None
    text: str = ""
    score: float = 0.0
    failure: str | None = None
    reward: float = 0.0
    advantage: float = 0.0
    old_logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    reference_logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def key(self) -> tuple[int, int]:
        """Unique key within the run: (prompt number, member)."""
        return self.prompt.number, self.member

    @property
    def is_scored(self) -> bool:
        """Whether the score says something about the response. A response without an answer is scored."""
        return self.failure in (None, NO_ANSWER)

    @property
    def is_complete(self) -> bool:
        """Whether the response ended with a stop token, not at the length limit."""
        return self.finish_reason == "stop"


def scores(samples: list[Sample]) -> np.ndarray:
    """Return the scores, fp64 [N]."""
    return np.array([sample.score for sample in samples], np.float64)


def are_scored(samples: list[Sample]) -> np.ndarray:
    """Return which samples are scored; the others have no advantage, bool [N]."""
    return np.array([sample.is_scored for sample in samples], bool)


def lengths_tokens(samples: list[Sample]) -> np.ndarray:
    """Return the response lengths in tokens, int64 [N]."""
    return np.array([len(sample.tokens) for sample in samples])


def group_numbers(samples: list[Sample]) -> np.ndarray:
    """Return the prompt number of each sample, which identifies its group, int64 [N]."""
    return np.array([sample.prompt.number for sample in samples])
