"""Kernels of the expert-parallel exchange with two ranks in one process: too few rows, and tokens that stay on a rank.

Equality with the reference at the model's sizes: tests/kernels/startup/test_checks.py. Between GPUs: tests/multigpu.
"""

import pytest
import torch
from torch import Tensor

from megatron_q3n.kernels.moe.expert_exchange import ExchangeShape, PublishedBuffers, rows_of_published

RANKS, TOKENS, HIDDEN, EXPERTS, TOPK = 2, 37, 16, 8, 3
SHAPE = ExchangeShape(TOKENS + 5, HIDDEN, EXPERTS, TOPK)


def published(map_SE: Tensor, device: str) -> list[PublishedBuffers]:
    """Return both ranks' buffers, holding token s as a row of s, and the gates 1, 2, 3 … of each token."""
    size = PublishedBuffers.total_bytes(SHAPE, RANKS)
    memories = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(RANKS)]
    addresses = [memory.data_ptr() for memory in memories]
    buffers = [PublishedBuffers(SHAPE, memory, addresses, rank) for rank, memory in enumerate(memories)]
    tokens = torch.arange(RANKS * TOKENS, dtype=torch.bfloat16, device=device)[:, None].expand(-1, HIDDEN)
    gates = map_SE.cumsum(1).float()
    for rank, own in enumerate(buffers):
        part = slice(rank * TOKENS, (rank + 1) * TOKENS)
        for name, tensor in (("x", tokens), ("map", map_SE), ("probs", gates)):
            own.publish(name, tensor[part].contiguous())
    return buffers


def routing_map(device: str, first: int = 0, last: int = EXPERTS) -> Tensor:
    """Return a map [S,E] with TOPK of the experts first … last-1 for each token."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(RANKS * TOKENS, last - first, generator=generator)
    map_SE = torch.zeros(RANKS * TOKENS, EXPERTS, dtype=torch.bool)
    return map_SE.scatter_(1, first + scores.topk(TOPK, 1).indices, True).to(device)


@pytest.mark.parametrize("capacity", [None, 128, 40, 1])
def test_rows_are_sorted_by_expert_and_cut_at_the_capacity(capacity: int | None, triton_device: str) -> None:
    map_SE = routing_map(triton_device)
    peak = torch.zeros(1, dtype=torch.int32, device=triton_device)
    most = 0
    for rank, buffers in enumerate(published(map_SE, triton_device)):
        rows, gates, counts, row_SK = rows_of_published(buffers, TOKENS, capacity, peak)
        local = map_SE[:, rank * EXPERTS // RANKS : (rank + 1) * EXPERTS // RANKS]
        expert, token = local.T.nonzero(as_tuple=True)
        kept = min(len(token), capacity or len(token))
        most = max(most, len(token))
        assert counts.sum() == kept
        assert counts.tolist() == torch.bincount(expert[:kept], minlength=EXPERTS // RANKS).tolist()
        assert rows[:kept].eq(token[:kept, None]).all()
        assert gates[:kept].equal(map_SE.cumsum(1)[token[:kept], rank * EXPERTS // RANKS + expert[:kept]].float())
        named = row_SK[row_SK >= 0]
        assert named.sort().values.equal(torch.arange(kept, dtype=torch.int32, device=triton_device))
        assert peak.item() == most, "rows beyond the capacity must be counted too"


def test_a_rank_may_get_no_token(triton_device: str) -> None:
    map_SE = routing_map(triton_device, last=EXPERTS // RANKS)
    buffers = published(map_SE, triton_device)
    peak = torch.zeros(1, dtype=torch.int32, device=triton_device)
    _, _, counts, row_SK = rows_of_published(buffers[1], TOKENS, None, peak)
    assert counts.sum() == 0
    assert row_SK.eq(-1).all()
    assert rows_of_published(buffers[0], TOKENS, None, peak)[2].sum() == RANKS * TOKENS * TOPK
