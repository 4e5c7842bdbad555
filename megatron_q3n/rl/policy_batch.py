"""Packed policy batches: samples packed into rows for the trainer, with advantages, log-probs and routes per token.

Rows are distributed round-robin over data-parallel ranks, and empty rows make their number equal, because ranks that
share experts run in lockstep. The same samples therefore give the same gradient for any number of ranks.

Shapes: T tokens of a row, L layers with experts, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_q3n.data.batch import Batch
from megatron_q3n.data.conversations import TokenizedConversation
from megatron_q3n.data.sft_packing import best_fit_decreasing, pack
from megatron_q3n.rl.samples import Sample


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """A packed row of samples; `loss_mask_BT` holds the tokens' weights in the loss.

    Shapes: [1,T] fp32; `sample_BT` int64, the sample's index in the row, -1 at prompts and padding; `routes_TLK`
        int64, -1 where no route was recorded, None without replay; `old_BT` is None where no old log-probs were
        computed.
    """

    advantage_BT: Tensor | None = None
    old_BT: Tensor | None = None
    rollout_BT: Tensor | None = None
    reference_BT: Tensor | None = None
    sample_BT: Tensor | None = None
    routes_TLK: Tensor | None = None

    def to(self, device: torch.device | str) -> "PolicyBatch":
        """Return the row on a device."""
        values = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        packing = None if self.packing is None else self.packing.to(device)
        return PolicyBatch(**{**values, "packing": packing})


@dataclass(frozen=True)
class PackedPolicyBatch:
    """A packed row with its samples; `response_starts` are the positions that predict each first response token."""

    batch: PolicyBatch
    samples: list[Sample]
    response_starts: list[int]

    def response_values(self, values_T: np.ndarray) -> list[np.ndarray]:
        """Return the values at each sample's response tokens."""
        return [
            values_T[start : start + len(sample.tokens)] for sample, start in zip(self.samples, self.response_starts)
        ]


def pack_policy_batches(
    samples: Sequence[Sample], weights_N: np.ndarray, sequence_length: int, eod: int, *, replay: bool
) -> list[PackedPolicyBatch]:
    """Pack samples into rows of `sequence_length` tokens; `weights_N` is the loss weight of each sample's tokens.

    Deterministic: every process gets the same rows from the same samples.
    """
    sizes = [len(sample.prompt.tokens) + len(sample.tokens) - 1 for sample in samples]
    return [
        _pack_row([samples[i] for i in indices], weights_N[indices], sequence_length, eod, replay=replay)
        for indices in best_fit_decreasing(sizes, sequence_length)
    ]


def shard_for_rank(
    packed: list[PackedPolicyBatch], rank: int, size: int, sequence_length: int, eod: int
) -> list[PackedPolicyBatch]:
    """Return the rows of data-parallel rank `rank` of `size`; empty rows make all ranks' counts equal."""
    count = -(-len(packed) // size)
    empty = _pack_row([], np.empty(0), sequence_length, eod, replay=False)
    local = packed[rank::size]
    routes_TLK = packed[0].batch.routes_TLK
    if routes_TLK is not None:
        no_routes_TLK = torch.full_like(routes_TLK, -1)
        empty = replace(empty, batch=replace(empty.batch, routes_TLK=no_routes_TLK))
    return local + [empty] * (count - len(local))


def _pack_row(
    samples: list[Sample], weights: np.ndarray, sequence_length: int, eod: int, *, replay: bool
) -> PackedPolicyBatch:
    conversations = [_weighted_tokens(sample, weight) for sample, weight in zip(samples, weights)]
    batch = pack(conversations, sequence_length, 1, eod)
    assert batch.packing is not None
    begins = batch.packing.offsets[: len(samples)]
    starts = [begin + len(s.prompt.tokens) - 1 for begin, s in zip(begins, samples)]
    sample_T = np.full(sequence_length, -1, np.int64)
    for index, (sample, start) in enumerate(zip(samples, starts)):
        sample_T[start : start + len(sample.tokens)] = index
    policy = PolicyBatch(
        **vars(batch),
        **_value_tensors(samples, starts, sequence_length),
        sample_BT=torch.from_numpy(sample_T)[None],
        routes_TLK=_pack_routes(samples, begins, sequence_length) if replay and samples else None,
    )
    return PackedPolicyBatch(policy, samples, starts)


def _value_tensors(samples: list[Sample], starts: list[int], sequence_length: int) -> dict[str, Tensor]:
    """Return advantages and log-probs of a row, fp32 [1,T], 0 outside responses; `old_BT` if any sample has it."""
    columns = {name: np.zeros(sequence_length, np.float32) for name in ("advantage", "old", "rollout", "reference")}
    for sample, start in zip(samples, starts):
        response = slice(start, start + len(sample.tokens))
        columns["advantage"][response] = sample.advantage
        columns["rollout"][response] = sample.logprobs
        for name, logprobs in (("old", sample.old_logprobs), ("reference", sample.reference_logprobs)):
            if len(logprobs):
                columns[name][response] = logprobs
    if not any(len(sample.old_logprobs) for sample in samples):
        del columns["old"]
    return {f"{name}_BT": torch.from_numpy(x)[None] for name, x in columns.items()}


def _weighted_tokens(sample: Sample, weight: float) -> TokenizedConversation:
    tokens = np.array([*sample.prompt.tokens, *sample.tokens], np.int64)
    weights = np.zeros(len(tokens), np.float32)
    weights[len(sample.prompt.tokens) :] = weight
    return TokenizedConversation(tokens, weights)


def _pack_routes(samples: list[Sample], begins: Sequence[int], sequence_length: int) -> Tensor:
    """Return the recorded routes of a row, int64 [T,L,K]."""
    first_routes = samples[0].routes
    assert first_routes is not None, "the engine recorded no routes"
    routes_TLK = np.full((sequence_length, *first_routes.shape[1:]), -1, np.int64)
    for sample, begin in zip(samples, begins):
        assert sample.routes is not None
        routes_TLK[begin : begin + len(sample.routes)] = sample.routes
    return torch.from_numpy(routes_TLK)
