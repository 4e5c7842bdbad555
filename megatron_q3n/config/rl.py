"""Reinforcement learning settings: prompts, rollout engine, rewards, and the policy loss."""

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.paths import DataPath, FilePath
from megatron_q3n.config.sampling import Temperature
from megatron_q3n.config.section import Section
from megatron_q3n.config.sft import TaskSet


@dataclass(frozen=True)
class PolicyRules:
    """The choices that define an algorithm.

    ratio: importance ratio of each token, or of the whole sequence (geometric mean over its tokens)
    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]
    advantage_scale: "std" divides a group's centered rewards by their standard deviation, "none" does not
    normalisation: mean over sequences of their token means, mean over all tokens, or division by a constant length
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
    """Prompts with their scoring arguments: a task set, or files of {messages or prompt, answer}."""

    path: DataPath | None = Field(
        None,
        description="a file, folder or glob pattern, as in sft.train; rows of {prompt}, {messages}, ShareGPT or Alpaca "
        "shape, whose other values go to the reward function",
    )
    task: TaskSet | None = None
    columns: dict[str, str] = Field(
        default_factory=dict, description="the file's columns by our names, e.g. {prompt: problem, answer: solution}"
    )
    weight: float = Field(1.0, gt=0, le=100, description="how often each prompt occurs in one pass; 0.5: half of them")

    @model_validator(mode="after")
    def _legal(self) -> "PromptSource":
        if (self.path is None) == (self.task is None):
            raise UserError("rl.prompts: a source is either {path: …} or {task: {name: …}}, not both or neither.")
        if self.task is not None and self.columns:
            raise UserError(f"rl.prompts: columns={self.columns} has no effect with a task set; remove it.")
        return self


class RolloutConfig(Section):
    """Rollout engine and sampling."""

    engine: Literal["in_process", "http"] = Field(
        "in_process", description="in_process: the model being trained, no copy; http: OpenAI-compatible servers"
    )
    urls: list[str] = Field(default_factory=list, description="http: each server's address, including /v1")
    prompts: int = Field(16, gt=0, description="prompts of a rollout, over all ranks")
    samples_per_prompt: int = Field(8, gt=1, description="responses to each prompt: the group size")
    max_new_tokens: int = Field(64, gt=0)
    temperature: Temperature = Field(1.0, gt=0, description="sampling temperature, 0.001 to 1000")
    max_sequences: int | None = Field(None, gt=0, description="in_process: batch limit of each rank; null: all")
    api_key_env: str = Field(
        "Q3N_API_KEY", description="http: environment variable with the servers' API key, if they have one"
    )
    timeout_seconds: float = Field(300, gt=0, description="http: after this time a request is retried")
    attempts: int = Field(4, gt=0, description="http: how often a request is sent before the run fails")
    weight_sync_dir: FilePath | None = Field(
        None, description="http: a folder for new weights that servers can read; null: in the run directory"
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
                f"rl.rollout.temperature={self.temperature} with rl.rollout.engine=http: servers return "
                "log-probs before the temperature, but the policy loss needs them after it; set it to 1."
            )
        return self


class RewardConfig(Section):
    """Scoring of responses, always in confined worker processes and with a time limit."""

    kind: Literal["task", "math_verify", "function"] = Field(
        "task", description="task: reasoning-gym's own score; function: a scoring function of yours"
    )
    function: str | None = Field(None, description="module:name of a function (answer: str, arguments: dict) -> float")
    answer_pattern: str | None = Field(
        None, description="regular expression; the first group of its last match is the answer; null: the whole text"
    )
    time_limit_seconds: float = Field(10, gt=0)
    workers: int = Field(2, gt=0, description="scoring worker processes of each rank")
    failure_score: float = Field(
        0.0,
        description="score of a response without an answer; one whose scoring failed is shown with it, not trained on",
    )
    memory_gib: float = Field(4.0, gt=0, description="memory of a scoring worker process with all processes it starts")
    network: bool = Field(False, description="kind=function: whether the function may use the network")
    environment: list[str] = Field(
        default_factory=list, description="kind=function: names of environment variables that the function receives"
    )
    readable_paths: list[FilePath] = Field(
        default_factory=list,
        description="kind=function: files and folders it may read beside Python's, the working folder and PYTHONPATH",
    )

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
                "module:name, other kinds none."
            )
        for name in ("network", "environment", "readable_paths"):
            if self.kind != "function" and getattr(self, name):
                raise UserError(f"rl.reward.{name} with rl.reward.kind={self.kind}: only kind=function may have more.")
        if self.function is not None and not re.fullmatch(r"[\w.]+:\w+", self.function):
            raise UserError(f"rl.reward.function={self.function!r}: write it as module:name.")
        return self


class RlConfig(Section):
    """The reinforcement learning loop: prompts, rollout, rewards, advantages, policy loss."""

    prompts: list[PromptSource] = Field(default_factory=list)
    held_out: list[PromptSource] = Field(
        default_factory=list,
        description="prompts on which accuracy is evaluated, never trained on; empty: a share of rl.prompts",
    )
    held_out_percent: float = Field(
        5.0,
        ge=0,
        lt=50,
        description="that share by text hash, at least one and at most 500 texts; 0: no held-out prompts",
    )
    held_out_interval_steps: int = Field(0, ge=0, description="0: only before the first and after the last step")
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: Literal["gspo", "grpo", "dr_grpo", "dapo"] = "gspo"
    ratio: Literal["token", "sequence"] | None = Field(
        None, description="this and the next four: null takes the algorithm's"
    )
    clip_low: float | None = Field(None, gt=0, lt=1)
    clip_high: float | None = Field(None, gt=0)
    advantage_scale: Literal["std", "none"] | None = None
    normalisation: Literal["sequence", "token", "constant"] | None = None
    kl_coefficient: float = Field(
        0.0, ge=0, description="weight of the KL to the initial weights in the loss; 0: no reference policy"
    )
    entropy_coefficient: float = Field(0.0, ge=0)
    importance_cap: float | None = Field(
        2.0, gt=0, description="truncated importance sampling: cap on π_old / π_rollout; null: off"
    )
    routing_replay: bool = Field(True, description="training replays the experts that the rollout selected")
    dynamic_sampling: bool | None = Field(
        None, description="zero-variance groups (all scores equal) are replaced by new ones; null: with dapo"
    )
    dynamic_sampling_rounds: int = Field(
        8, gt=0, description="most rounds of generation for one batch, which zero-variance groups then fill"
    )
    overlong_buffer_tokens: int = Field(
        0, ge=0, description="soft overlong penalty over the last tokens before max_new_tokens; 0: none"
    )
    overlong_penalty: float = Field(1.0, ge=0, description="the penalty at max_new_tokens")
    updates_per_rollout: int = Field(
        1, gt=0, description="optimizer steps (mini-batches) on each rollout, each on an equal share of its groups"
    )
    old_logprobs_interval_rollouts: int = Field(
        1,
        gt=0,
        description="interval at which the trainer's old log-probs and the mismatch are computed; above 1 only with "
        "one update per rollout, which then uses its own detached log-probs",
    )
    max_staleness: int = Field(
        16, ge=0, description="most optimizer steps between a sample's generation and its update"
    )
    shuffled_rewards: bool = Field(
        False, description="control experiment: rewards are randomly permuted over the rollout"
    )

    @property
    def rules(self) -> PolicyRules:
        """The algorithm's rules, overridden by the settings that are not null."""
        default = ALGORITHMS[self.algorithm]
        overrides = {name: getattr(self, name) for name in PolicyRules.__dataclass_fields__}
        return PolicyRules(**{name: getattr(default, name) if v is None else v for name, v in overrides.items()})

    @property
    def resamples_zero_variance_groups(self) -> bool:
        """Whether zero-variance groups are replaced by newly generated ones (dynamic sampling)."""
        setting = self.dynamic_sampling
        return self.algorithm == "dapo" if setting is None else setting

    @model_validator(mode="after")
    def _legal(self) -> "RlConfig":
        default = type(self).model_fields["held_out_percent"].default
        if self.held_out and self.held_out_percent != default:
            raise UserError(
                f"rl.held_out_percent={self.held_out_percent} has no effect with rl.held_out; set it to {default}."
            )
        weighted = next((source for source in self.held_out if source.weight != 1), None)
        if weighted is not None:
            raise UserError(
                f"rl.held_out: weight={weighted.weight} has no effect; each prompt is evaluated once. Remove it."
            )
        num_groups = self.rollout.prompts
        if num_groups % self.updates_per_rollout:
            raise UserError(
                f"rl.rollout.prompts={num_groups} is not divisible by rl.updates_per_rollout="
                f"{self.updates_per_rollout}: each update takes an equal share of the groups."
            )
        if self.old_logprobs_interval_rollouts > 1 and self.updates_per_rollout > 1:
            raise UserError(
                f"rl.old_logprobs_interval_rollouts={self.old_logprobs_interval_rollouts} with "
                f"rl.updates_per_rollout={self.updates_per_rollout}: later updates of a rollout need the old "
                "log-probs from before the first one; set one of them to 1."
            )
        if self.updates_per_rollout - 1 > self.max_staleness:
            raise UserError(
                f"rl.updates_per_rollout={self.updates_per_rollout}: the last update is "
                f"{self.updates_per_rollout - 1} steps newer than its samples' weights, more than rl.max_staleness="
                f"{self.max_staleness}; lower one or raise the other."
            )
        if self.overlong_buffer_tokens >= self.rollout.max_new_tokens:
            raise UserError(
                f"rl.overlong_buffer_tokens={self.overlong_buffer_tokens} must be below "
                f"rl.rollout.max_new_tokens={self.rollout.max_new_tokens}."
            )
        if self.routing_replay and self.rollout.engine == "http":
            raise UserError(
                "rl.routing_replay=true with rl.rollout.engine=http: OpenAI's API does not carry routes; "
                "set rl.routing_replay=false, or use the in-process engine."
            )
        return self
