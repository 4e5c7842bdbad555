"""What travels through the loop: prompts, and samples that gather what each verb finds out about them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """A prompt of the run, the `number`th that was drawn. `grading` is what a grader is told, as JSON has it."""

    number: int
    tokens: list[int]
    grading: dict[str, Any]


@dataclass
class Sample:
    """One answer.

    `logprobs` are natural logarithms of the probabilities its tokens were drawn with. `policy_version` is
    the optimizer step of the weights that drew them. `routes` are the experts of every token but the last
    one drawn, which no model has read: uint16 [prompt + answer - 1, layers, experts per token].
    `score` is the grader's or the rule's word (`failure` says why), `reward` what the advantage is made of.
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
    def name(self) -> tuple[int, int]:
        """What this sample is in the run: no two have the same."""
        return self.prompt.number, self.member

    @property
    def is_whole(self) -> bool:
        """Whether the answer ended by itself."""
        return self.finish_reason == "stop"
