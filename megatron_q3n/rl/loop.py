"""Reinforcement learning loop, one method per phase: generate, score, compute_advantages, compute_old_logprobs, update.

    prompts -> samples -> rewards -> advantages -> old log-probs -> policy loss -> optimizer step -> new weights

A rollout is a function of the weights, the seed and the number of its first prompt. A run that is killed anywhere
between two checkpoints therefore generates the same samples again: none is lost or used twice. Every rank holds all
samples of a rollout; the parallel layout only decides which rank works on which samples.
"""

import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_q3n.config.rl import RlConfig
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.rl.advantages import group_advantages, overlong_penalties, token_weights, zero_variance_groups
from megatron_q3n.rl.loop_metrics import mismatch_metrics, rollout_metrics, update_metrics
from megatron_q3n.rl.mismatch import Mismatch
from megatron_q3n.rl.policy_batch import PolicyBatch, pack_policy_batches, shard_for_rank
from megatron_q3n.rl.policy_pass import PolicyPass, attach_routing_replays
from megatron_q3n.rl.prompts import Prompts
from megatron_q3n.rl.reference_policy import ReferencePolicy
from megatron_q3n.rl.reward_workers import RewardWorkers
from megatron_q3n.rl.rollout_engine import RolloutEngine
from megatron_q3n.rl.samples import Prompt, Sample, are_scored, group_numbers, lengths_tokens, scores
from megatron_q3n.rl.scoring_failures import ScoringFailures
from megatron_q3n.rl.trainer_logprobs import compute_logprobs
from megatron_q3n.training.state import TrainState
from megatron_q3n.training.step import StepReport, train_step


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step: its report, the packed batches of this rank, and the metrics to record."""

    report: StepReport
    batches: list[PolicyBatch]
    values: dict[str, float]


@dataclass
class RlLoop:
    """Model, rollout engine, reward workers and prompts of a run.

    `next_prompt`, `tokens` and `skipped_prompts` are restored when a run resumes (stages/rl_files.py).
    `skipped_prompts` holds half-open ranges of prompt numbers that are never generated from; `rollout_prompts` those of
    the rollouts since the last checkpoint. `notes` collects lines for the log until the stage takes them.
    """

    state: TrainState
    engine: RolloutEngine
    reward_workers: RewardWorkers
    prompts: Prompts
    tokenizer: TextTokenizer
    stop_tokens: frozenset[int]
    reference: ReferencePolicy | None = None
    next_prompt: int = 0
    tokens: int = 0
    skipped_prompts: list[tuple[int, int]] = field(default_factory=list)
    rollout_prompts: list[tuple[int, int]] = field(default_factory=list)
    scoring_failures: ScoringFailures = field(default_factory=ScoringFailures)
    notes: list[str] = field(default_factory=list)

    def rollout(self) -> tuple[list[Sample], dict[str, float]]:
        """Return the samples of one rollout, with advantages and old log-probs, and its metrics."""
        started = time.perf_counter()
        samples, num_groups_generated = self.generate()
        scored = time.perf_counter()
        self.compute_advantages(samples)
        mismatch = self.compute_old_logprobs(samples)
        values = rollout_metrics(samples)
        if mismatch is not None:
            values |= mismatch_metrics(mismatch)
        values["rollout/groups_generated"] = num_groups_generated
        values["rollout/seconds"] = scored - started
        values["rollout/logprobs_seconds"] = time.perf_counter() - scored
        return samples, values

    def generate(self) -> tuple[list[Sample], int]:
        """Generate and score responses until there are enough groups; with dynamic sampling of non-zero variance.

        If `rl.dynamic_sampling_rounds` do not suffice, zero-variance groups fill the batch.
        Returns: the samples of `rl.rollout.prompts` groups, and the number of groups generated for them.
        """
        rl = self.settings
        selected: list[Sample] = []
        rejected: list[Sample] = []
        first_prompt, num_groups_generated = self.next_prompt, 0
        max_rounds = rl.dynamic_sampling_rounds if rl.resamples_zero_variance_groups else 1
        group_size, num_groups = rl.rollout.samples_per_prompt, rl.rollout.prompts
        for _ in range(max_rounds):
            prompts = self._next_prompts(num_groups - len(selected) // group_size)
            num_groups_generated += len(prompts)
            samples = self.engine.generate(prompts, group_size)
            self.score(samples)
            is_rejected_N = zero_variance_groups(scores(samples), group_numbers(samples), are_scored(samples))
            is_rejected_N &= rl.resamples_zero_variance_groups
            selected += [sample for sample, is_rejected in zip(samples, is_rejected_N) if not is_rejected]
            rejected += [sample for sample, is_rejected in zip(samples, is_rejected_N) if is_rejected]
            if len(selected) == num_groups * group_size:
                break
        self.rollout_prompts.append((first_prompt, self.next_prompt))
        return selected + rejected[: num_groups * group_size - len(selected)], num_groups_generated

    def score(self, samples: list[Sample]) -> None:
        """Decode and score responses; each rank scores a share, and all ranks get all scores. A collective call.

        Raises: UserError if scoring fails for nearly all.
        """
        for sample in samples:
            tokens = [token for token in sample.tokens if token not in self.stop_tokens]
            sample.text = self.tokenizer.decode(tokens)
        group = self.state.parallel
        local = samples[group.rank :: group.world_size]
        self.reward_workers.score(local)
        shards: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(shards, {sample.key: (sample.score, sample.failure) for sample in local})
        results = {key: result for shard in shards for key, result in shard.items()}
        for sample in samples:
            sample.score, sample.failure = results[sample.key]
        self.notes += self.scoring_failures.update(samples)

    def compute_advantages(self, samples: list[Sample]) -> None:
        """Set each sample's reward (score plus overlong penalty) and group-relative advantage."""
        rl = self.settings
        rewards_N, is_scored_N = scores(samples), are_scored(samples)
        if rl.shuffled_rewards:
            shuffled = rewards_N[is_scored_N].tolist()
            random.Random(f"{self.seed}.{samples[0].key}").shuffle(shuffled)
            rewards_N[is_scored_N] = shuffled
        max_tokens, buffer = rl.rollout.max_new_tokens, rl.overlong_buffer_tokens
        rewards_N = rewards_N + overlong_penalties(lengths_tokens(samples), max_tokens, buffer, rl.overlong_penalty)
        advantages_N = group_advantages(rewards_N, group_numbers(samples), rl.rules.advantage_scale, is_scored_N)
        for sample, reward, advantage in zip(samples, rewards_N, advantages_N):
            sample.reward, sample.advantage = float(reward), float(advantage)

    def compute_old_logprobs(self, samples: list[Sample]) -> Mismatch | None:
        """Set the samples' old and reference log-probs, by the weights before the update.

        The old log-probs are computed every `rl.old_logprobs_interval_rollouts`; in between, the only update of a
        rollout starts from its own detached log-probs.
        Returns: the training–rollout mismatch, None where no old log-probs were computed.
        """
        rl, mismatch = self.settings, None
        num_rollouts = self.state.step // rl.updates_per_rollout
        if num_rollouts % rl.old_logprobs_interval_rollouts == 0:
            logprobs, mismatch = self._compute_logprobs(samples)
            for sample, logprobs_T in zip(samples, logprobs):
                sample.old_logprobs = logprobs_T
        if self.reference is not None:
            with self.reference.swapped_in():
                logprobs, _ = self._compute_logprobs(samples, measures_mismatch=False)
            for sample, logprobs_T in zip(samples, logprobs):
                sample.reference_logprobs = logprobs_T
        return mismatch

    def update(self, samples: list[Sample]) -> UpdateResult:
        """Take one optimizer step on the policy loss of the samples. A collective call."""
        rl, state = self.settings, self.state
        staleness_steps = [state.step - sample.policy_version for sample in samples]
        assert max(staleness_steps) <= rl.max_staleness, "the configuration bounds it"
        batches = self._packed_batches(samples)
        policy = PolicyPass(rl, self.tokenizer.vocab_size, with_loss=True)
        began = time.perf_counter()
        with attach_routing_replays(state.models, recording=False):
            report = train_step(state, batches, policy)
        state.device.synchronize()
        self.tokens += int(sum(len(s.prompt.tokens) + len(s.tokens) for s in samples))
        values = update_metrics(state, policy, report)
        values["rl/staleness_max"] = max(staleness_steps)
        values["tokens"] = self.tokens
        values["throughput/step_seconds"] = time.perf_counter() - began
        return UpdateResult(report, batches, values)

    def minibatches(self, samples: list[Sample]) -> list[list[Sample]]:
        """Split a rollout into one mini-batch of whole groups for each of its updates."""
        size = len(samples) // self.settings.updates_per_rollout
        return [samples[first : first + size] for first in range(0, len(samples), size)]

    def evaluate(self, held_out: Prompts) -> tuple[float, list[Sample]]:
        """Return the share of held-out prompts whose greedy response scores 1 or more, and the responses."""
        samples = self.engine.generate_greedy(held_out.take(0, len(held_out)))
        self.score(samples)
        return float(np.mean((scores(samples) >= 1) & are_scored(samples))), samples

    @property
    def settings(self) -> RlConfig:
        """The loop's settings."""
        return self.state.config.rl

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.state.config.training.seed

    def _next_prompts(self, count: int) -> list[Prompt]:
        """Return the next prompts, except those in a skipped range."""
        prompts: list[Prompt] = []
        while len(prompts) < count:
            ends = [end for begin, end in self.skipped_prompts if begin <= self.next_prompt < end]
            if ends:
                self.next_prompt = max(ends)
                continue
            prompts.append(self.prompts[self.next_prompt])
            self.next_prompt += 1
        return prompts

    def _packed_batches(self, samples: list[Sample]) -> list[PolicyBatch]:
        """Return this rank's packed batches, with the tokens weighted as the algorithm normalizes its loss."""
        rl, group, eod = self.settings, self.state.parallel, self.tokenizer.eod
        sequence_length = self.state.config.training.sequence_length
        weights_N = token_weights(lengths_tokens(samples), rl.rules.normalisation, rl.rollout.max_new_tokens)
        packed = pack_policy_batches(samples, weights_N, sequence_length, eod, replay=rl.routing_replay)
        local = shard_for_rank(packed, group.data_rank, group.data_size, sequence_length, eod)
        return [packed_batch.batch for packed_batch in local]

    def _compute_logprobs(
        self, samples: list[Sample], *, measures_mismatch: bool = True
    ) -> tuple[list[np.ndarray], Mismatch | None]:
        policy = PolicyPass(self.settings, self.tokenizer.vocab_size, with_loss=False)
        replay, eod = self.settings.routing_replay, self.tokenizer.eod
        return compute_logprobs(self.state, samples, policy, eod, replay=replay, measures_mismatch=measures_mismatch)
