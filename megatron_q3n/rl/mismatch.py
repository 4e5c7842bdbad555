"""Training–rollout mismatch: how far the trainer's log-probs and routing are from those of the rollout engine.

Both have the same weights, but generation runs the decode kernels (recurrent delta rule) and training the chunked ones.
Rounding differs, and through top-k routing a small difference can select another expert.

Shapes: T tokens of a packed row, K experts per token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_q3n.model.moe.routing_replay import routes_differ
from megatron_q3n.rl.policy_batch import PackedPolicyBatch
from megatron_q3n.rl.samples import Sample
from megatron_q3n.training.state import TrainState


@dataclass
class Mismatch:
    """Differences between trainer and rollout on the same tokens.

    logprob_diff_mean, logprob_diff_max: absolute difference of the sampled tokens' log-probs, nats;
    kl: KL(rollout, trainer) estimated from them (k3), nats per token;
    routing_mismatch: per layer, share of tokens for which the trainer's own top-k selects other experts; empty
        where the rollout recorded no routes;
    routing_mismatch_after_replay: the same of the experts that were used, 0 with routing replay;
    chunked_rule_error: relative difference of the chunked from the recurrent delta rule, largest over the layers.
    """

    logprob_diff_mean: float
    logprob_diff_max: float
    kl: float
    routing_mismatch: list[float]
    routing_mismatch_after_replay: list[float]
    chunked_rule_error: float


def logprob_mismatch(samples: list[Sample], logprobs: list[np.ndarray]) -> tuple[float, float, float]:
    """Return mean and largest absolute difference of trainer and rollout log-probs, and their KL (k3 estimate)."""
    rollout = np.concatenate([np.asarray(s.logprobs, np.float64) for s in samples])
    difference = np.concatenate(logprobs).astype(np.float64) - rollout
    kl = float((np.exp(difference) - difference - 1).mean())
    return float(np.abs(difference).mean()), float(np.abs(difference).max()), kl


def routing_mismatch(
    state: TrainState, local: list[PackedPolicyBatch], recorded: dict[int, Any]
) -> tuple[list[float], list[float]]:
    """Return, per layer, the share of tokens whose experts differ from the rollout's. A collective call.

    `recorded` holds for each layer the experts of each packed batch: the trainer's own top-k, and those used.
    Returns: shares of the own top-k, and of the experts used.
    """
    num_layers = state.config.model.num_layers
    # columns: own top-k differs, used experts differ, tokens compared
    counts = torch.zeros(num_layers, 3, dtype=torch.float64, device=torch.cuda.current_device())
    group = state.models[0].pg_collection.tp  # type: ignore[union-attr]
    num_shards = state.parallel.groups.tp.size()
    for layer, (topk, used) in recorded.items():
        for packed_batch, topk_TK, used_TK in zip(local, topk, used):
            if not packed_batch.samples:
                continue
            rollout_TK = _rollout_routes(packed_batch, layer, topk_TK.shape[0] * num_shards)
            rollout_TK = rollout_TK.chunk(num_shards)[group.rank()].to(topk_TK.device)
            is_recorded_T = rollout_TK[:, 0] >= 0
            for column, routes_TK in enumerate((topk_TK, used_TK)):
                counts[layer, column] += (routes_differ(routes_TK, rollout_TK) & is_recorded_T).sum()
            counts[layer, 2] += is_recorded_T.sum()
    if state.parallel.world_size > 1:
        torch.distributed.all_reduce(counts)
    shares = counts[:, :2] / counts[:, 2:].clamp(min=1)
    return shares[:, 0].tolist(), shares[:, 1].tolist()


def _rollout_routes(packed_batch: PackedPolicyBatch, layer: int, num_tokens: int) -> torch.Tensor:
    """Return the rollout's experts of a layer for each token of a packed row, int64 [T,K]; -1 where none."""
    first_routes = packed_batch.samples[0].routes
    assert first_routes is not None
    routes_TK = np.full((num_tokens, first_routes.shape[-1]), -1, np.int64)
    for sample, start in zip(packed_batch.samples, packed_batch.response_starts):
        assert sample.routes is not None
        begin = start - len(sample.prompt.tokens) + 1
        routes_TK[begin : begin + len(sample.routes)] = sample.routes[:, layer]
    return torch.from_numpy(routes_TK)
