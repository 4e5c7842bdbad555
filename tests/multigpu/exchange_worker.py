"""One rank of test_exchange.py, under torchrun: the exchange through symmetric memory against the collective one.

torchrun --nproc-per-node 2 tests/multigpu/exchange_worker.py RESULTS.json
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_q3n.kernels.moe.expert_exchange import CollectiveExchange, ExchangeShape, SymmetricExchange

# name -> tokens, hidden, experts, topk, routing
CASES: dict[str, tuple[int, int, int, int, str]] = {
    "random": (512, 64, 16, 4, "random"),
    "odd tokens": (333, 128, 16, 3, "random"),
    "one token": (1, 64, 8, 2, "random"),
    "64 experts a rank": (1024, 256, 128, 10, "random"),
    "256 experts a rank": (640, 2048, 512, 10, "random"),
    "a rank gets no token": (256, 64, 16, 4, "first rank"),
    "a rank's tokens stay": (256, 64, 16, 4, "own rank"),
    "more slots than local experts": (128, 64, 8, 6, "random"),
}


def main(results: Path) -> None:
    """Run all cases; rank 0 writes the largest relative errors."""
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl", device_id=device)
    group = torch.distributed.group.WORLD
    assert group is not None
    found: dict[str, Any] = {}
    for name, (tokens, hidden, experts, topk, routing) in CASES.items():
        inputs = inputs_of(tokens, hidden, experts, topk, routing, rank, device)
        symmetric = SymmetricExchange(group, ExchangeShape(tokens + 7, hidden, experts, topk), device)
        found[name] = compare(inputs, symmetric, CollectiveExchange(group))
        if name == "64 experts a rank":
            found["captured"] = captured(inputs, symmetric, tokens, hidden, experts, topk, rank, device)
            found["overflow"] = overflow(inputs, symmetric)
    worst: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(worst, found)
    if rank == 0:
        results.write_text(json.dumps(worst, indent=1))
        print(json.dumps(worst, indent=1))
    torch.distributed.destroy_process_group()


def inputs_of(
    tokens: int, hidden: int, experts: int, topk: int, routing: str, rank: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Return tokens, routing map, gates, residual and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(17 * tokens + rank)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=device)
    logits = normal(tokens, experts)
    if routing != "random":
        chosen = 0 if routing == "first rank" else rank
        mine = torch.arange(experts, device=device) // (experts // torch.distributed.get_world_size()) == chosen
        logits = torch.where(mine, logits, -float("inf"))
    map_TE = torch.zeros(tokens, experts, dtype=torch.bool, device=device)
    map_TE.scatter_(1, logits.topk(topk, 1).indices, True)
    gates = torch.rand(tokens, experts, generator=generator, device=device) * map_TE
    x, add, dout = (normal(tokens, hidden).bfloat16() for _ in range(3))
    return x, map_TE, gates, add, dout


def outputs_of(exchange: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return rows, gates, counts, output, and the gradients of tokens, gates and residual; f(row) = row · gate."""
    x, map_TE, gates, add, dout = inputs
    x, gates, add = (t.detach().clone().requires_grad_() for t in (x, gates, add))
    dispatched = exchange.dispatch(x, map_TE, gates)
    expert_output = (dispatched.rows * dispatched.gates[:, None]).bfloat16()
    out = exchange.combine(expert_output, dispatched, add)
    out.backward(dout)
    count = int(dispatched.counts.sum())
    rows, row_gates = dispatched.rows[:count], dispatched.gates[:count]
    return [t.detach() for t in (rows, row_gates, dispatched.counts, out, x.grad, gates.grad, add.grad)]


def compare(inputs: tuple[Tensor, ...], ours: Any, reference: Any) -> list[float]:
    """Return the relative error of every output."""
    errors = []
    for actual, expected in zip(outputs_of(ours, inputs), outputs_of(reference, inputs), strict=True):
        assert actual.shape == expected.shape, (actual.shape, expected.shape)
        norm = expected.float().norm().clamp(min=1e-9)
        errors.append(((actual.float() - expected.float()).norm() / norm).item() if expected.numel() else 0.0)
    return errors


def captured(inputs: tuple[Tensor, ...], exchange: SymmetricExchange, *sizes_rank_device: Any) -> list[float]:
    """Capture dispatch and combine in a CUDA graph, replay it with other tokens and routes, and compare the output."""
    tokens, hidden, experts, topk, rank, device = sizes_rank_device
    x, map_TE, gates, add, _ = (t.clone() for t in inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), exchange.static_capacity(2 * tokens * topk), torch.cuda.graph(graph):
        dispatched = exchange.dispatch(x, map_TE, gates)
        out = exchange.combine((dispatched.rows * dispatched.gates[:, None]).bfloat16(), dispatched, add)
    errors = []
    for round_ in range(3):
        others = inputs_of(tokens, hidden, experts, topk, "random", rank + 10 * (round_ + 1), device)
        for static, other in zip((x, map_TE, gates, add), others):
            static.copy_(other)
        for _ in range(20):
            graph.replay()
        expected = outputs_of(CollectiveExchange(torch.distributed.group.WORLD), others)[3]
        errors.append(((out.float() - expected.float()).norm() / expected.float().norm()).item())
    return errors


def overflow(inputs: tuple[Tensor, ...], exchange: SymmetricExchange) -> list[float]:
    """Dispatch into too few rows. Returns: rows needed, rows noticed, rows kept, capacity."""
    x, map_TE, gates, _, _ = inputs
    needed = int(exchange.dispatch(x, map_TE, gates).counts.sum())
    exchange.peak_rows.zero_()
    with exchange.static_capacity(needed // 2):
        dispatched = exchange.dispatch(x, map_TE, gates)
        capacity = exchange.capacity or 0
    return [needed, int(exchange.peak_rows), int(dispatched.counts.sum()), capacity]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
