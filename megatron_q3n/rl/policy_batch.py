"""Samples packed into rows for the trainer: which token was drawn where, and all that is known of it.

Rows are dealt out to data-parallel ranks in turn, and empty ones make their numbers equal, because ranks
that share experts work in step. So the same samples give the same gradient however many ranks there are.

Shapes: T tokens of a row, L layers with experts, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_q3n.data.batch import Batch
from megatron_q3n.data.conversations import Spelled
from megatron_q3n.data.sft_rows import lay_out, pack
from megatron_q3n.rl.samples import Sample


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """A packed row of samples; `loss_mask_BT` holds the tokens' weights in the loss.

    Shapes: [1,T] fp32, `sample_BT` int64 with -1 where nothing was drawn; `routes_TLK` int64, -1 where there
        are none, None without replay; `old_BT` None where nobody asked the trainer.
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
        return PolicyBatch(**values)


@dataclass(frozen=True)
class PolicyRow:
    """A row, and which samples stand in it, each with the place of its first drawn token's prediction."""

    batch: PolicyBatch
    samples: list[Sample]
    starts: list[int]

    def answers(self, values_T: np.ndarray) -> list[np.ndarray]:
        """Return the values at each sample's drawn tokens."""
        return [values_T[start : start + len(sample.tokens)] for sample, start in zip(self.samples, self.starts)]


def policy_rows(
    samples: Sequence[Sample], weights: np.ndarray, length: int, eod: int, *, replay: bool
) -> list[PolicyRow]:
    """Pack samples, each with its weight per token, into rows of so many tokens.

    Every process makes the same rows from the same samples.
    """
    sizes = [len(sample.prompt.tokens) + len(sample.tokens) - 1 for sample in samples]
    return [
        _row([samples[i] for i in chosen], weights[chosen], length, eod, replay=replay)
        for chosen in pack(sizes, length)
    ]


def share_of(rows: list[PolicyRow], rank: int, size: int, length: int, eod: int) -> list[PolicyRow]:
    """Return the rows of a data-parallel rank, as many for each."""
    count = -(-len(rows) // size)
    empty = _row([], np.empty(0), length, eod, replay=False)
    mine = rows[rank::size]
    replayed = rows[0].batch.routes_TLK
    if replayed is not None:
        free = torch.full_like(replayed, -1)
        empty = replace(empty, batch=replace(empty.batch, routes_TLK=free))
    return mine + [empty] * (count - len(mine))


def _row(samples: list[Sample], weights: np.ndarray, length: int, eod: int, *, replay: bool) -> PolicyRow:
    spelled = [_spelled(sample, weight) for sample, weight in zip(samples, weights)]
    batch = lay_out(spelled, length, 1, eod)
    assert batch.cu_seqlens is not None
    begins = batch.cu_seqlens[: len(samples)].tolist()
    starts = [begin + len(s.prompt.tokens) - 1 for begin, s in zip(begins, samples)]
    names = ("advantage", "old", "rollout", "reference")
    columns = {name: np.zeros(length, np.float32) for name in names}
    sample_T = np.full(length, -1, np.int64)
    for number, (sample, start) in enumerate(zip(samples, starts)):
        place = slice(start, start + len(sample.tokens))
        sample_T[place] = number
        columns["advantage"][place] = sample.advantage
        columns["rollout"][place] = sample.logprobs
        for name, known in (("old", sample.old_logprobs), ("reference", sample.reference_logprobs)):
            if len(known):
                columns[name][place] = known
    tensors = {f"{name}_BT": torch.from_numpy(x)[None] for name, x in columns.items()}
    if not any(len(sample.old_logprobs) for sample in samples):
        del tensors["old_BT"]
    policy = PolicyBatch(
        **vars(batch),
        **tensors,
        sample_BT=torch.from_numpy(sample_T)[None],
        routes_TLK=_routes(samples, begins, length) if replay and samples else None,
    )
    return PolicyRow(policy, samples, starts)


def _spelled(sample: Sample, weight: float) -> Spelled:
    tokens = np.array([*sample.prompt.tokens, *sample.tokens], np.int64)
    weights = np.zeros(len(tokens), np.float32)
    weights[len(sample.prompt.tokens) :] = weight
    return Spelled(tokens, weights)


def _routes(samples: list[Sample], begins: list[int], length: int) -> Tensor:
    known = [sample.routes for sample in samples]
    assert known[0] is not None, "the engine recorded no routes"
    routes_TLK = np.full((length, *known[0].shape[1:]), -1, np.int64)
    for begin, routes in zip(begins, known):
        assert routes is not None
        routes_TLK[begin : begin + len(routes)] = routes
    return torch.from_numpy(routes_TLK)
