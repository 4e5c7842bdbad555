"""The loop's verbs, each a method one can read: draw, grade, judge, look back, learn.

    prompts -> samples -> rewards -> advantages -> old probabilities -> policy loss -> step -> new weights

Everything in a rollout is a function of the weights, the seed and the number of the first prompt, so a run
that was killed anywhere between two checkpoints makes the same samples again: none is lost or used twice.
Every rank holds all samples of a rollout; the layout decides only who works on which.
"""

import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_q3n.config.rl import RlConfig
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.rl.advantages import even_groups, group_advantages, overlong_penalties, token_weights
from megatron_q3n.rl.mismatch import Mismatch, score
from megatron_q3n.rl.policy_batch import PolicyBatch, policy_rows, share_of
from megatron_q3n.rl.policy_pass import SUMS, PolicyPass, taped
from megatron_q3n.rl.prompts import Prompts
from megatron_q3n.rl.reference_policy import Reference
from megatron_q3n.rl.rewards import Graders
from megatron_q3n.rl.rollout_engine import RolloutEngine
from megatron_q3n.rl.samples import Prompt, Sample
from megatron_q3n.training.state import TrainState
from megatron_q3n.training.step import StepReport, train_step


@dataclass(frozen=True)
class Learnt:
    """One update: what the step reports, the rows it was made on (this rank's), and what to record."""

    report: StepReport
    batches: list[PolicyBatch]
    values: dict[str, float]


@dataclass
class RlLoop:
    """All that a step needs. `next_prompt`, `tokens` and `left_out` are what a resumed run must be told.

    `left_out` holds ranges (first, behind the last) of prompts that are passed over; `drawn` those of the rollouts
    since somebody last emptied it.
    """

    state: TrainState
    engine: RolloutEngine
    graders: Graders
    prompts: Prompts
    tokenizer: TextTokenizer
    stop_tokens: frozenset[int]
    reference: Reference | None = None
    next_prompt: int = 0
    tokens: int = 0
    left_out: list[tuple[int, int]] = field(default_factory=list)
    drawn: list[tuple[int, int]] = field(default_factory=list)

    def rollout(self) -> tuple[list[Sample], dict[str, float]]:
        """Draw one batch of samples, graded, judged and with the trainer's view of them; and what to report."""
        started = time.perf_counter()
        samples, drawn = self.draw()
        answered = time.perf_counter()
        self.judge(samples)
        mismatch = self.look_back(samples)
        values = _rollout_values(samples)
        if mismatch is not None:
            values |= _mismatch_values(mismatch)
        values["rollout/groups_drawn"] = drawn
        values["rollout/seconds"] = answered - started
        values["rollout/look_back_seconds"] = time.perf_counter() - answered
        return samples, values

    def draw(self) -> tuple[list[Sample], int]:
        """Answer and grade prompts until there are enough groups that teach something.

        Returns: the samples of `rl.rollout.prompts` groups, and how many groups were drawn for them.
        """
        rl = self.settings
        kept: list[Sample] = []
        spare: list[Sample] = []
        first, drawn = self.next_prompt, 0
        rounds = rl.dynamic_sampling_rounds if rl.redraws_even_groups else 1
        size, wanted = rl.rollout.samples_per_prompt, rl.rollout.prompts
        for _ in range(rounds):
            prompts = self._take(wanted - len(kept) // size)
            drawn += len(prompts)
            samples = self.engine.answer(prompts, size)
            self.grade(samples)
            even = even_groups(_scores(samples), _groups(samples))
            even &= rl.redraws_even_groups
            kept += [sample for sample, is_even in zip(samples, even) if not is_even]
            spare += [sample for sample, is_even in zip(samples, even) if is_even]
            if len(kept) == wanted * size:
                break
        self.drawn.append((first, self.next_prompt))
        return kept + spare[: wanted * size - len(kept)], drawn

    def _take(self, count: int) -> list[Prompt]:
        """Return the next prompts, without those left out."""
        prompts: list[Prompt] = []
        while len(prompts) < count:
            behind = [last for first, last in self.left_out if first <= self.next_prompt < last]
            if behind:
                self.next_prompt = max(behind)
                continue
            prompts.append(self.prompts[self.next_prompt])
            self.next_prompt += 1
        return prompts

    def grade(self, samples: list[Sample]) -> None:
        """Decode and score answers, each rank its share."""
        for sample in samples:
            text = [token for token in sample.tokens if token not in self.stop_tokens]
            sample.text = self.tokenizer.decode(text)
        group = self.state.parallel
        mine = samples[group.rank :: group.world_size]
        self.graders.score(mine)
        shares: list[Any] = [None] * group.world_size
        found = {sample.name: (sample.score, sample.failure) for sample in mine}
        torch.distributed.all_gather_object(shares, found)
        everyone = {name: verdict for share in shares for name, verdict in share.items()}
        for sample in samples:
            sample.score, sample.failure = everyone[sample.name]

    def judge(self, samples: list[Sample]) -> None:
        """Turn scores into rewards and advantages."""
        rl = self.settings
        rewards = _scores(samples)
        if rl.shuffled_rewards:
            dealt = rewards.tolist()
            random.Random(f"{self.seed}.{samples[0].name}").shuffle(dealt)
            rewards = np.array(dealt)
        longest, buffer = rl.rollout.max_new_tokens, rl.overlong_buffer_tokens
        rewards = rewards + overlong_penalties(_lengths(samples), longest, buffer, rl.overlong_penalty)
        advantages = group_advantages(rewards, _groups(samples), rl.rules.advantage_scale)
        for sample, reward, advantage in zip(samples, rewards, advantages):
            sample.reward, sample.advantage = float(reward), float(advantage)

    def look_back(self, samples: list[Sample]) -> Mismatch | None:
        """Ask the trainer, and the reference, what they think of the samples before anything is learnt.

        Between two looks the trainer is not asked: the one update of a rollout begins from its own probabilities.
        """
        rl, mismatch = self.settings, None
        rollouts = self.state.step // rl.updates_per_rollout
        if rollouts % rl.look_back_interval_rollouts == 0:
            known, mismatch = self._score(samples)
            for sample, logprobs in zip(samples, known):
                sample.old_logprobs = logprobs
        if self.reference is not None:
            with self.reference.in_place():
                known, _ = self._score(samples, measures=False)
            for sample, logprobs in zip(samples, known):
                sample.reference_logprobs = logprobs
        return mismatch

    def learn(self, samples: list[Sample]) -> Learnt:
        """Take one optimizer step on samples."""
        rl, group = self.settings, self.state.parallel
        staleness = [self.state.step - sample.policy_version for sample in samples]
        assert max(staleness) <= rl.max_staleness, "the configuration bounds it"
        lengths = _lengths(samples)
        weights = token_weights(lengths, rl.rules.normalisation, rl.rollout.max_new_tokens)
        row, eod = self.state.config.training.sequence_length, self.tokenizer.eod
        rows = policy_rows(samples, weights, row, eod, replay=rl.routing_replay)
        mine = share_of(rows, group.data_rank, group.data_size, row, eod)
        batches = [row.batch for row in mine]
        policy = PolicyPass(rl, self.tokenizer.vocab_size, learns=True)
        began = time.perf_counter()
        with taped(self.state.models, recording=False):
            report = train_step(self.state, batches, policy)
        self.state.device.synchronize()
        self.tokens += int(sum(len(s.prompt.tokens) for s in samples) + lengths.sum())
        values = (
            _policy_values(self.state, policy)
            | _load_values(report)
            | {
                "rl/staleness_max": max(staleness),
                "rl/mtp_gradient": mtp_gradient(self.state),
                "rl/balance_in_loss": _balance_in_loss(self.state, report),
                "throughput/step_seconds": time.perf_counter() - began,
                "learning_rate": report.learning_rate,
                "loss/policy": report.loss,
                "tokens": self.tokens,
                "memory/peak_gib": self.state.device.peak_memory_gib(),
            }
        )
        if self.state.skipped_steps:
            values["skipped_steps"] = self.state.skipped_steps
        if report.grad_norm is not None:
            values["grad_norm"] = report.grad_norm
        return Learnt(report, batches, values)

    def shares(self, samples: list[Sample]) -> list[list[Sample]]:
        """Split a rollout into the samples of each of its updates, whole groups each."""
        size = len(samples) // self.settings.updates_per_rollout
        return [samples[first : first + size] for first in range(0, len(samples), size)]

    def examine(self, held_out: Prompts) -> tuple[float, list[Sample]]:
        """Return the share of held-out prompts whose likeliest answer gets full marks, and the answers."""
        samples = self.engine.answer_greedily(held_out.take(0, len(held_out)))
        self.grade(samples)
        return float(np.mean(_scores(samples) >= 1)), samples

    @property
    def settings(self) -> RlConfig:
        """The loop's settings."""
        return self.state.config.rl

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.state.config.training.seed

    def _score(self, samples: list[Sample], *, measures: bool = True) -> tuple[list[np.ndarray], Mismatch | None]:
        policy = PolicyPass(self.settings, self.tokenizer.vocab_size, learns=False)
        replay = self.settings.routing_replay
        eod = self.tokenizer.eod
        return score(self.state, samples, policy, eod, replay=replay, measures=measures)


def mtp_gradient(state: TrainState) -> float:
    """Return the largest gradient of any MTP parameter: 0 proves that nothing of MTP is in the loss."""
    largest = torch.zeros((), device=torch.cuda.current_device())
    for model in state.models:
        for name, parameter in model.named_parameters():
            if name.startswith("mtp."):
                largest = torch.maximum(largest, parameter.main_grad.abs().max())  # type: ignore[attr-defined]
    if state.parallel.world_size > 1:
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest.item()


def _balance_in_loss(state: TrainState, report: StepReport) -> float:
    """Return what the balance loss added to the policy loss."""
    losses = report.balance_losses.values()
    return state.config.model.moe_aux_loss_coeff * sum(losses)


def _policy_values(state: TrainState, policy: PolicyPass) -> dict[str, float]:
    """Average the pass's sums over the tokens of all ranks."""
    sums, group = policy.sums, state.parallel
    if group.world_size > 1:
        torch.distributed.all_reduce(sums, group=group.groups.dp)
        if group.groups.pp.size() > 1:
            last = torch.distributed.get_process_group_ranks(group.groups.pp)[-1]
            torch.distributed.broadcast(sums, src=last, group=group.groups.pp)
    named = dict(zip(SUMS, sums.tolist()))
    tokens = max(named.pop("tokens"), 1)
    return {f"rl/{name}": value / tokens for name, value in named.items()}


def _load_values(report: StepReport) -> dict[str, float]:
    """Say how even the experts' load is; nothing balances it here."""
    loads = report.expert_load.values()
    if not loads:
        return {}
    return {
        "experts/max_over_mean": max(max(load) * len(load) for load in loads),
        "experts/dead": sum(share == 0 for load in loads for share in load),
    }


def _rollout_values(samples: list[Sample]) -> dict[str, float]:
    scores, lengths = _scores(samples), _lengths(samples)
    return {
        "reward/score": float(scores.mean()),
        "reward/reward": float(np.mean([sample.reward for sample in samples])),
        "reward/full_marks": float((scores >= 1).mean()),
        "reward/even_groups": float(even_groups(scores, _groups(samples)).mean()),
        "reward/failures": sum(sample.failure is not None for sample in samples),
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_max": int(lengths.max()),
        "rollout/cut_off": float(np.mean([not sample.is_whole for sample in samples])),
    }


def _mismatch_values(mismatch: Mismatch) -> dict[str, float]:
    values = {
        "mismatch/logprob_mean": mismatch.logprob_mean,
        "mismatch/logprob_max": mismatch.logprob_max,
        "mismatch/kl": mismatch.kl,
        "mismatch/chunks": mismatch.chunks,
    }
    for layer, share in enumerate(mismatch.routes_own, 1):
        values[f"mismatch/routes_{layer}"] = share
    if mismatch.routes_used:
        values["mismatch/routes_used"] = max(mismatch.routes_used)
    return values


def _scores(samples: list[Sample]) -> np.ndarray:
    return np.array([sample.score for sample in samples], np.float64)


def _lengths(samples: list[Sample]) -> np.ndarray:
    return np.array([len(sample.tokens) for sample in samples])


def _groups(samples: list[Sample]) -> np.ndarray:
    return np.array([sample.prompt.number for sample in samples])
