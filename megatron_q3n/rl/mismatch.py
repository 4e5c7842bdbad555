"""What the trainer's weights think of samples: their probabilities, and how far the rollout's are from them.

One pass without gradient over the packed samples. It gives the "old" probabilities that ratios start from,
or those of the reference, and on the way measures the mismatch: the same weights, once with the recurrent
kernels of generation and once with the chunked ones of training.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_q3n.model.moe.routing_replay import differing
from megatron_q3n.rl.chunked_rule_check import ChunkCheck, checking, worst
from megatron_q3n.rl.policy_batch import PolicyRow, policy_rows, share_of
from megatron_q3n.rl.policy_pass import PolicyPass, taped
from megatron_q3n.rl.samples import Sample
from megatron_q3n.training.state import TrainState
from megatron_q3n.training.step import run_microbatches


@dataclass
class Mismatch:
    """How trainer and rollout differ on the same tokens.

    logprob_mean, logprob_max: absolute difference of the log probabilities of the drawn tokens, nats;
    kl: KL(rollout, trainer) estimated from them, nats per token;
    routes_own, routes_used: share of tokens whose experts differ, per layer: the trainer's own choice, and
        what it used (with replay: none); empty where the rollout recorded none;
    chunks: relative difference of the delta rule by chunks from the one by recurrence, in the worst layer.
    """

    logprob_mean: float
    logprob_max: float
    kl: float
    routes_own: list[float]
    routes_used: list[float]
    chunks: float


@torch.no_grad()
def score(
    state: TrainState, samples: list[Sample], policy: PolicyPass, eod: int, *, replay: bool, measures: bool
) -> tuple[list[np.ndarray], Mismatch | None]:
    """Return the log probability of each sample's tokens, in the order of the samples, and if asked the mismatch.

    A collective call; every rank gets the same.
    """
    group, length = state.parallel, state.config.training.sequence_length
    rows = policy_rows(samples, np.zeros(len(samples)), length, eod, replay=replay)
    mine = share_of(rows, group.data_rank, group.data_size, length, eod)
    for chunk in state.chunks:
        chunk.eval()
    knows_routes = measures and samples[0].routes is not None
    check: AbstractContextManager[dict[int, ChunkCheck]] = checking(state.models) if measures else nullcontext({})
    with taped(state.models, recording=knows_routes) as tapes, check as checks:
        reports = run_microbatches(state, [row.batch for row in mine], forward_only=True, forward=policy)
        taken = {number: tape.take() for number, tape in tapes.items()}
    found: dict[tuple[int, int], np.ndarray] = {}
    if group.is_last_stage:
        for row, report in zip(mine, reports):
            values = row.answers(report["logprobs"].cpu().numpy())
            found |= {sample.name: v for sample, v in zip(row.samples, values)}
    shares: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(shares, found)
    everyone = {name: values for share in shares for name, values in share.items()}
    logprobs = [everyone[sample.name] for sample in samples]
    if not measures:
        return logprobs, None
    own, used = _differing_routes(state, mine, taken) if knows_routes else ([], [])
    chunks = worst(checks, state.config.model.num_layers, group.world_size)
    return logprobs, _mismatch(samples, logprobs, own, used, chunks)


def _mismatch(
    samples: list[Sample], logprobs: list[np.ndarray], own: list[float], used: list[float], chunks: float
) -> Mismatch:
    rollout = np.concatenate([np.asarray(s.logprobs, np.float64) for s in samples])
    difference = np.concatenate(logprobs).astype(np.float64) - rollout
    return Mismatch(
        float(np.abs(difference).mean()),
        float(np.abs(difference).max()),
        float((np.exp(difference) - difference - 1).mean()),
        own,
        used,
        chunks,
    )


def _differing_routes(
    state: TrainState, rows: list[PolicyRow], taken: dict[int, Any]
) -> tuple[list[float], list[float]]:
    """Return, per layer, the share of tokens whose experts the trainer would choose, or used, otherwise."""
    layers = state.config.model.num_layers
    counts = torch.zeros(layers, 3, dtype=torch.float64, device=torch.cuda.current_device())
    group = state.models[0].pg_collection.tp  # type: ignore[union-attr]
    split = state.parallel.groups.tp.size()
    for number, (own, used) in taken.items():
        for row, own_TK, used_TK in zip(rows, own, used):
            if not row.samples:
                continue
            recorded_TK = _recorded(row, number, own_TK.shape[0] * split)
            recorded_TK = recorded_TK.chunk(split)[group.rank()].to(own_TK.device)
            known_T = recorded_TK[:, 0] >= 0
            for place, routes_TK in enumerate((own_TK, used_TK)):
                counts[number, place] += (differing(routes_TK, recorded_TK) & known_T).sum()
            counts[number, 2] += known_T.sum()
    if state.parallel.world_size > 1:
        torch.distributed.all_reduce(counts)
    shares = counts[:, :2] / counts[:, 2:].clamp(min=1)
    return shares[:, 0].tolist(), shares[:, 1].tolist()


def _recorded(row: PolicyRow, layer: int, length: int) -> torch.Tensor:
    first = row.samples[0].routes
    assert first is not None
    recorded = np.full((length, first.shape[-1]), -1, np.int64)
    for sample, start in zip(row.samples, row.starts):
        assert sample.routes is not None
        begin = start - len(sample.prompt.tokens) + 1
        recorded[begin : begin + len(sample.routes)] = sample.routes[:, layer]
    return torch.from_numpy(recorded)
