"""Log-probs of samples by the trainer: one forward pass without gradient over the packed samples.

By the weights before the update these are the old log-probs, which importance ratios start from; by the reference
weights they are those of the KL penalty. The same pass measures the training–rollout mismatch (mismatch.py).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from megatron_q3n.rl.delta_rule_mismatch import DeltaRuleProbe, attach_delta_rule_probes, max_relative_error
from megatron_q3n.rl.mismatch import Mismatch, logprob_mismatch, routing_mismatch
from megatron_q3n.rl.policy_batch import PackedPolicyBatch, pack_policy_batches, shard_for_rank
from megatron_q3n.rl.policy_pass import PolicyPass, attach_routing_replays
from megatron_q3n.rl.samples import Sample
from megatron_q3n.training.state import TrainState
from megatron_q3n.training.step import run_microbatches


@torch.no_grad()
def compute_logprobs(
    state: TrainState, samples: list[Sample], policy: PolicyPass, eod: int, *, replay: bool, measures_mismatch: bool
) -> tuple[list[np.ndarray], Mismatch | None]:
    """Return each sample's log-probs (fp32 [response tokens], nats) in the order of the samples, and the mismatch.

    A collective call; every rank gets the same values.
    """
    group, sequence_length = state.parallel, state.config.training.sequence_length
    packed = pack_policy_batches(samples, np.zeros(len(samples)), sequence_length, eod, replay=replay)
    local = shard_for_rank(packed, group.data_rank, group.data_size, sequence_length, eod)
    for chunk in state.chunks:
        chunk.eval()
    records_routes = measures_mismatch and samples[0].routes is not None
    probing: AbstractContextManager[dict[int, DeltaRuleProbe]] = nullcontext({})
    if measures_mismatch:
        probing = attach_delta_rule_probes(state.models)
    with attach_routing_replays(state.models, recording=records_routes) as replays, probing as probes:
        reports = run_microbatches(state, [p.batch for p in local], forward_only=True, forward=policy)
        recorded = {layer: routes.pop_recorded() for layer, routes in replays.items()}
    logprobs = _gather_logprobs(state, samples, local, reports)
    if not measures_mismatch:
        return logprobs, None
    topk_share, used_share = routing_mismatch(state, local, recorded) if records_routes else ([], [])
    chunked_rule_error = max_relative_error(probes, state.config.model.num_layers, group.world_size)
    mean, largest, kl = logprob_mismatch(samples, logprobs)
    return logprobs, Mismatch(mean, largest, kl, topk_share, used_share, chunked_rule_error)


def _gather_logprobs(
    state: TrainState, samples: list[Sample], local: list[PackedPolicyBatch], reports: list[Any]
) -> list[np.ndarray]:
    """Return all ranks' log-probs in the order of the samples. A collective call."""
    local_logprobs: dict[tuple[int, int], np.ndarray] = {}
    if state.parallel.is_last_stage:
        for packed_batch, report in zip(local, reports):
            values = packed_batch.response_values(report["logprobs"].cpu().numpy())
            local_logprobs |= {sample.key: v for sample, v in zip(packed_batch.samples, values)}
    shards: list[Any] = [None] * state.parallel.world_size
    torch.distributed.all_gather_object(shards, local_logprobs)
    by_key = {key: values for shard in shards for key, values in shard.items()}
    return [by_key[sample.key] for sample in samples]
