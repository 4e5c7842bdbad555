"""Metrics of the reinforcement learning loop: of a rollout, of the training–rollout mismatch, and of an update.

Names and units are described in metrics/names.py. Functions marked as collective are called on every rank.
"""

import numpy as np
import torch

from megatron_q3n.rl.advantages import zero_variance_groups
from megatron_q3n.rl.mismatch import Mismatch
from megatron_q3n.rl.policy_pass import SUMS, PolicyPass
from megatron_q3n.rl.samples import NO_ANSWER, Sample, are_scored, group_numbers, lengths_tokens, scores
from megatron_q3n.training.state import TrainState
from megatron_q3n.training.step import StepReport


def rollout_metrics(samples: list[Sample]) -> dict[str, float]:
    """Return scores, rewards and response lengths of a rollout; scores and rewards of the scored samples only."""
    scores_N, lengths_N, is_scored_N = scores(samples), lengths_tokens(samples), are_scored(samples)
    rewards_N = np.array([sample.reward for sample in samples])
    has_scores = bool(is_scored_N.any())
    return {
        "reward/score_mean": float(scores_N[is_scored_N].mean()) if has_scores else 0.0,
        "reward/reward_mean": float(rewards_N[is_scored_N].mean()) if has_scores else 0.0,
        "reward/solved": float((scores_N[is_scored_N] >= 1).mean()) if has_scores else 0.0,
        "reward/zero_variance_groups": float(
            zero_variance_groups(scores_N, group_numbers(samples), is_scored_N).mean()
        ),
        "reward/failures": int((~is_scored_N).sum()),
        "reward/failure_share": float((~is_scored_N).mean()),
        "reward/no_answer": sum(sample.failure == NO_ANSWER for sample in samples),
        "rollout/length_mean": float(lengths_N.mean()),
        "rollout/length_max": int(lengths_N.max()),
        "rollout/truncated": float(np.mean([not sample.is_complete for sample in samples])),
    }


def mismatch_metrics(mismatch: Mismatch) -> dict[str, float]:
    """Return the training–rollout mismatch as metrics."""
    values = {
        "train_rollout/logprob_diff_mean": mismatch.logprob_diff_mean,
        "train_rollout/logprob_diff_max": mismatch.logprob_diff_max,
        "train_rollout/kl": mismatch.kl,
        "train_rollout/chunked_rule_error": mismatch.chunked_rule_error,
    }
    for layer, share in enumerate(mismatch.routing_mismatch):
        values[f"train_rollout/routing_mismatch_layer_{layer}"] = share
    if mismatch.routing_mismatch_after_replay:
        values["train_rollout/routing_mismatch_after_replay"] = max(mismatch.routing_mismatch_after_replay)
    return values


def update_metrics(state: TrainState, policy: PolicyPass, report: StepReport) -> dict[str, float]:
    """Return the metrics of one optimizer step. A collective call."""
    values = (
        _policy_metrics(state, policy)
        | _expert_load_metrics(report)
        | {
            "rl/mtp_grad_max": max_mtp_gradient(state),
            "rl/load_balancing_loss": _load_balancing_loss(state, report),
            "learning_rate": report.learning_rate,
            "loss/policy": report.loss,
            "memory/peak_gib": state.device.peak_memory_gib(),
        }
    )
    if state.skipped_steps:
        values["skipped_steps"] = state.skipped_steps
    if report.grad_norm is not None:
        values["grad_norm"] = report.grad_norm
    return values


def max_mtp_gradient(state: TrainState) -> float:
    """Return the largest gradient of any MTP parameter; 0 if MTP is not part of the loss. A collective call."""
    largest = torch.zeros((), device=torch.cuda.current_device())
    for model in state.models:
        for name, parameter in model.named_parameters():
            if name.startswith("mtp."):
                largest = torch.maximum(largest, parameter.main_grad.abs().max())  # type: ignore[attr-defined]
    if state.parallel.world_size > 1:
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest.item()


def _load_balancing_loss(state: TrainState, report: StepReport) -> float:
    """Return the part of the loss that is the experts' load balancing loss."""
    losses = report.balance_losses.values()
    return state.config.model.moe_aux_loss_coeff * sum(losses)


def _policy_metrics(state: TrainState, policy: PolicyPass) -> dict[str, float]:
    """Average the sums of a policy pass over the tokens of all ranks. A collective call."""
    sums, group = policy.sums, state.parallel
    if group.world_size > 1:
        torch.distributed.all_reduce(sums, group=group.groups.dp)
        if group.groups.pp.size() > 1:
            last = torch.distributed.get_process_group_ranks(group.groups.pp)[-1]
            torch.distributed.broadcast(sums, src=last, group=group.groups.pp)
    named = dict(zip(SUMS, sums.tolist()))
    num_tokens = max(named.pop("tokens"), 1)
    return {f"rl/{name}": value / num_tokens for name, value in named.items()}


def _expert_load_metrics(report: StepReport) -> dict[str, float]:
    """Return how uneven the experts' load is; no loss balances it in reinforcement learning."""
    loads = report.expert_load.values()
    if not loads:
        return {}
    return {
        "experts/load_imbalance": max(max(load) * len(load) for load in loads),
        "experts/dead": sum(share == 0 for load in loads for share in load),
    }
