"""Reinforcement learning: where prompts come from, who answers, how answers are graded, and the policy loss."""

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.section import Section
from megatron_q3n.config.sft import TaskSet


@dataclass(frozen=True)
class PolicyRules:
    """What an algorithm is made of.

    ratio: importance ratio of a token, or of its whole sequence (its geometric mean over the tokens)
    clip_low, clip_high: the ratio's distance from 1 at which the gradient ends
    advantage_scale: a group's rewards divided by their standard deviation, or only centred
    normalisation: mean over sequences of their tokens' means, over all tokens, or by a constant length
    """

    ratio: Literal["token", "sequence"]
    clip_low: float
    clip_high: float
    advantage_scale: Literal["std", "none"]
    normalisation: Literal["sequence", "token", "constant"]


ALGORITHMS = {
    "gspo": PolicyRules("sequence", 3e-4, 4e-4, "std", "sequence"),  # arXiv 2507.18071, section 5.1
    "grpo": PolicyRules("token", 0.2, 0.2, "std", "sequence"),  # arXiv 2402.03300
    "dr_grpo": PolicyRules("token", 0.2, 0.2, "none", "constant"),  # arXiv 2503.20783
    "dapo": PolicyRules("token", 0.2, 0.28, "std", "token"),  # arXiv 2503.14476
}


class PromptSource(Section):
    """Prompts and what their answers are graded by: a task set, or a .jsonl file of {messages or prompt, answer}."""

    path: str | None = None
    task: TaskSet | None = None

    @model_validator(mode="after")
    def _legal(self) -> "PromptSource":
        if (self.path is None) == (self.task is None):
            raise UserError("a source of prompts is either {path: …} or {task: {name: …}}.")
        return self


class RolloutConfig(Section):
    """Who answers the prompts, and how."""

    engine: Literal["in_process", "http"] = Field(
        "in_process", description="in_process: the weights being trained, no copy; http: OpenAI-compatible servers"
    )
    urls: list[str] = Field(default_factory=list, description="http: each server's address, up to and with /v1")
    prompts: int = Field(16, gt=0, description="prompts of a rollout over all ranks")
    samples_per_prompt: int = Field(8, gt=1, description="answers to each prompt: its group")
    max_new_tokens: int = Field(64, gt=0)
    temperature: float = Field(1.0, gt=0)
    max_sequences: int | None = Field(None, gt=0, description="in_process: most sequences at once on a rank; null: all")
    timeout_seconds: float = Field(300, gt=0, description="http: a request that takes longer is sent again")
    attempts: int = Field(4, gt=0, description="http: how often a request is sent before giving up")
    handover: str | None = Field(
        None, description="http: a folder that servers see too, for new weights; null: in the run directory"
    )

    @model_validator(mode="after")
    def _legal(self) -> "RolloutConfig":
        if (self.engine == "http") != bool(self.urls):
            raise UserError(
                f"rl.rollout.engine={self.engine} with rl.rollout.urls={self.urls}: http needs at least one "
                "address (e.g. http://host:8000/v1), in_process none."
            )
        if self.engine == "http" and self.temperature != 1:
            raise UserError(
                f"rl.rollout.temperature={self.temperature} with rl.rollout.engine=http: servers tell log "
                "probabilities before the temperature, and the policy's are needed after it; set it to 1."
            )
        return self


class RewardConfig(Section):
    """How an answer is graded; always in processes of their own, with a time limit."""

    kind: Literal["task", "math_verify", "function"] = Field(
        "task", description="task: reasoning-gym's own score; function: one of yours"
    )
    function: str | None = Field(None, description="module:name of a function (answer: str, prompt: dict) -> float")
    answer_pattern: str | None = Field(
        None, description="a regular expression whose last match's first group is the answer; null: the whole text"
    )
    time_limit_seconds: float = Field(10, gt=0)
    workers: int = Field(2, gt=0, description="grading processes of each rank")
    failed: float = Field(0.0, description="the score where grading hung, crashed, or found no answer")

    @field_validator("answer_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            groups = re.compile(pattern or "()").groups
        except re.error as error:
            raise UserError(f"rl.reward.answer_pattern={pattern!r}: {error}.") from None
        if groups < 1:
            raise UserError(f"rl.reward.answer_pattern={pattern!r} has no group (…) for the answer.")
        return pattern

    @model_validator(mode="after")
    def _legal(self) -> "RewardConfig":
        named = self.function is not None
        if named != (self.kind == "function"):
            raise UserError(
                f"rl.reward.kind={self.kind} with rl.reward.function={self.function}: kind=function needs "
                "module:name, the others none."
            )
        if self.function is not None and not re.fullmatch(r"[\w.]+:\w+", self.function):
            raise UserError(f"rl.reward.function={self.function!r}: write it as module:name.")
        return self


class RlConfig(Section):
    """The loop: prompts, rollout, rewards, advantages, policy loss."""

    prompts: list[PromptSource] = Field(default_factory=list)
    held_out: list[PromptSource] = Field(
        default_factory=list, description="prompts for the accuracy that is reported, never trained on"
    )
    held_out_interval_steps: int = Field(0, ge=0, description="0: only before the first and after the last")
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: Literal["gspo", "grpo", "dr_grpo", "dapo"] = "gspo"
    ratio: Literal["token", "sequence"] | None = Field(None, description="these five: null takes the algorithm's")
    clip_low: float | None = Field(None, gt=0, lt=1)
    clip_high: float | None = Field(None, gt=0)
    advantage_scale: Literal["std", "none"] | None = None
    normalisation: Literal["sequence", "token", "constant"] | None = None
    kl_coefficient: float = Field(
        0.0, ge=0, description="KL to the weights the run began with, in the loss; 0 keeps no copy"
    )
    entropy_coefficient: float = Field(0.0, ge=0)
    importance_cap: float | None = Field(
        2.0, gt=0, description="truncated importance sampling from rollout to trainer probabilities; null: off"
    )
    routing_replay: bool = Field(True, description="experts chosen in the rollout are used in training too")
    dynamic_sampling: bool | None = Field(
        None, description="groups whose answers all score the same are drawn anew; null: with dapo"
    )
    dynamic_sampling_rounds: int = Field(
        8, gt=0, description="most rollouts drawn for one batch before going on with what there is"
    )
    overlong_buffer_tokens: int = Field(
        0, ge=0, description="the last tokens of max_new_tokens over which a penalty grows; 0: none"
    )
    overlong_penalty: float = Field(1.0, ge=0, description="at the full length")
    updates_per_rollout: int = Field(
        1, gt=0, description="optimizer steps on each rollout, each on a share of its groups"
    )
    look_back_interval_rollouts: int = Field(
        1,
        gt=0,
        description="rollouts from one look at the trainer's probabilities, and the mismatch, to the next; "
        "above 1 only with one update a rollout, which then begins from its own",
    )
    max_staleness: int = Field(
        16, ge=0, description="most optimizer steps between the weights of a sample and its update"
    )
    shuffled_rewards: bool = Field(
        False, description="a control: rewards are dealt out at random over the whole rollout"
    )

    @property
    def rules(self) -> PolicyRules:
        """The algorithm's rules with what is set laid over them."""
        default = ALGORITHMS[self.algorithm]
        own = {name: getattr(self, name) for name in PolicyRules.__dataclass_fields__}
        return PolicyRules(**{name: getattr(default, name) if v is None else v for name, v in own.items()})

    @property
    def redraws_even_groups(self) -> bool:
        """Whether groups without a difference between their rewards are drawn anew."""
        chosen = self.dynamic_sampling
        return self.algorithm == "dapo" if chosen is None else chosen

    @model_validator(mode="after")
    def _legal(self) -> "RlConfig":
        groups = self.rollout.prompts
        if groups % self.updates_per_rollout:
            raise UserError(
                f"rl.rollout.prompts={groups} is not divisible by rl.updates_per_rollout="
                f"{self.updates_per_rollout}: each update takes an equal share of the groups."
            )
        if self.look_back_interval_rollouts > 1 and self.updates_per_rollout > 1:
            raise UserError(
                f"rl.look_back_interval_rollouts={self.look_back_interval_rollouts} with "
                f"rl.updates_per_rollout={self.updates_per_rollout}: later updates of a rollout need the probabilities "
                "that were before the first; set one of them to 1."
            )
        if self.updates_per_rollout - 1 > self.max_staleness:
            raise UserError(
                f"rl.updates_per_rollout={self.updates_per_rollout}: the last update is "
                f"{self.updates_per_rollout - 1} steps behind its samples' weights, more than rl.max_staleness="
                f"{self.max_staleness}; lower one or raise the other."
            )
        if self.overlong_buffer_tokens >= self.rollout.max_new_tokens:
            raise UserError(
                f"rl.overlong_buffer_tokens={self.overlong_buffer_tokens} must be below "
                f"rl.rollout.max_new_tokens={self.rollout.max_new_tokens}."
            )
        if self.routing_replay and self.rollout.engine == "http":
            raise UserError(
                "rl.routing_replay=true with rl.rollout.engine=http: OpenAI's interface does not carry routes; "
                "set rl.routing_replay=false, or use the in-process engine."
            )
        return self
