"""Start-up checks of the MoE kernels: permutation, SwiGLU, shared-expert gate, grouped GEMM, FP8 experts.

Each check returns the results of the fused kernel and of the reference; `qualification.py` compares them.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.config import RunConfig
from megatron_q3n.kernels.moe import fp8_experts, grouped_linear, permutation, shared_expert_gate, swiglu
from megatron_q3n.kernels.moe.expert_exchange import ExchangeShape, PublishedBuffers, rows_of_published
from megatron_q3n.kernels.startup.check_inputs import NUM_TOKENS, Results, random, with_gradients


def check_permutation(config: RunConfig) -> tuple[Results, Results]:
    """Run permute and unpermute, with gates and a residual, at the model's number of experts."""
    model = config.model
    logits = random(NUM_TOKENS, model.num_moe_experts, dtype=torch.float32)
    routing_map = _routing_map(logits, model.moe_router_topk)

    def run(fused: bool, x: Tensor, probs: Tensor, add: Tensor) -> Tensor:
        routes, gates = permutation.plan_routes(routing_map, probs, model.moe_router_topk, fused=fused)
        rows = permutation.scatter_rows(x, routes, fused=fused)
        weighted = (rows * gates[:, None]).to(x.dtype)
        return permutation.gather_rows(weighted, routes, add, fused=fused)

    inputs = [random(NUM_TOKENS, model.hidden_size), logits.sigmoid() * routing_map]
    inputs.append(random(NUM_TOKENS, model.hidden_size).flip(0))
    return with_gradients(partial(run, True), inputs), with_gradients(partial(run, False), inputs)


def check_expert_exchange(config: RunConfig) -> tuple[Results, Results]:
    """Run dispatch and combine of all expert-parallel ranks, forward and backward, with their buffers in this process.

    With exactly as many rows as needed, and with a capacity above it, whose additional rows are NaN.
    """
    model, ranks = config.model, config.parallel.expert_model_parallel_size
    shape = ExchangeShape(NUM_TOKENS, model.hidden_size, model.num_moe_experts, model.moe_router_topk)
    logits = random(ranks * NUM_TOKENS, model.num_moe_experts, dtype=torch.float32)
    map_SE = _routing_map(logits, model.moe_router_topk)
    probs_SE = logits.sigmoid() * map_SE
    x_SH, add_SH = (random(ranks * NUM_TOKENS + i, model.hidden_size)[i:] for i in range(2))
    inputs = x_SH, map_SE, probs_SE, add_SH
    above = ranks * NUM_TOKENS * model.moe_router_topk + 3
    actual = [*_exchanged_by_kernels(shape, *inputs), *_exchanged_by_kernels(shape, *inputs, capacity=above)]

    # every token's rows, in the order of its experts
    expected_rows, expected_gates = [], []
    token, expert = map_SE.nonzero(as_tuple=True)
    gates = probs_SE[token, expert]
    total = add_SH.float().index_add(0, token, x_SH[token].float() * gates[:, None])
    for rank in range(ranks):
        local = range(rank * model.num_moe_experts // ranks, (rank + 1) * model.num_moe_experts // ranks)
        for e in local:
            expected_rows.append(x_SH[map_SE[:, e]])
            expected_gates.append(probs_SE[map_SE[:, e], e])
    dprobs_SE = (x_SH.float() ** 2).sum(1, keepdim=True) * map_SE
    return actual, 2 * [torch.cat(expected_rows), torch.cat(expected_gates), total, dprobs_SE]


def _exchanged_by_kernels(
    shape: ExchangeShape, x_SH: Tensor, map_SE: Tensor, probs_SE: Tensor, add_SH: Tensor, capacity: int | None = None
) -> Results:
    """Return rows, gates, combined tokens and gradients of the gates, for the loss Σ gate · |x|², of all ranks."""
    from megatron_q3n.kernels.moe import expert_exchange_triton as kernels  # late: Triton

    ranks = x_SH.shape[0] // shape.tokens
    size = PublishedBuffers.total_bytes(shape, ranks)
    memories = [torch.empty(size, dtype=torch.uint8, device=x_SH.device) for _ in range(ranks)]
    addresses = [memory.data_ptr() for memory in memories]
    all_buffers = [PublishedBuffers(shape, memory, addresses, rank) for rank, memory in enumerate(memories)]
    own = lambda x, rank: x[rank * shape.tokens : (rank + 1) * shape.tokens].contiguous()
    for rank, buffers in enumerate(all_buffers):
        for name, tensor in (("x", x_SH), ("map", map_SE), ("probs", probs_SE)):
            buffers.publish(name, own(tensor, rank))
    peak = torch.zeros(1, dtype=torch.int32, device=x_SH.device)
    rows, gates = [], []
    for buffers in all_buffers:
        local_rows, local_gates, counts, row_SK = rows_of_published(buffers, shape.tokens, capacity, peak)
        count = int(counts.sum())
        local_rows[count:], local_gates[count:] = float("nan"), float("nan")
        rows.append(local_rows[:count])
        gates.append(local_gates[:count])
        weighted = (local_rows * local_gates[:, None]).to(x_SH.dtype)
        kernels.write_partial_sums(weighted, row_SK, buffers.local["partial"])
        kernels.write_gate_gradients((local_rows.float() ** 2).sum(1), row_SK, buffers.local["slots"])
    totals, dprobs = [], []
    for rank, buffers in enumerate(all_buffers):
        local_map = own(map_SE, rank)
        uses_TW = local_map.unflatten(1, (ranks, -1)).any(-1)
        out = torch.empty_like(own(x_SH, rank))
        kernels.sum_over_ranks(buffers.pointers["partial"], uses_TW, own(add_SH, rank), out, rank)
        totals.append(out)
        dprobs.append(kernels.pull_gate_gradients(buffers.pointers["slots"], local_map, shape.topk, rank))
    return [torch.cat(parts) for parts in (rows, gates, totals, dprobs)]


def check_swiglu(config: RunConfig) -> tuple[Results, Results]:
    """Run SwiGLU at the widths of the routed experts, with router gates, and of the shared expert, without."""
    width = _expert_width(config)
    shared = config.model.moe_shared_expert_intermediate_size or width
    shared //= config.parallel.tensor_model_parallel_size
    inputs = [random(NUM_TOKENS, 2 * width), random(NUM_TOKENS, dtype=torch.float32)]
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    for fused, result in zip((True, False), results):
        run = partial(swiglu.swiglu, fused=fused)
        result.extend(with_gradients(run, inputs))
        result.extend(with_gradients(partial(run, weight_R=None), [random(NUM_TOKENS, 2 * shared)]))
    return results


def check_shared_expert_gate(config: RunConfig) -> tuple[Results, Results]:
    """Run the shared-expert gate with a residual."""
    width = config.model.hidden_size
    inputs = [random(NUM_TOKENS, width), random(NUM_TOKENS + 1, width)[1:], 0.1 * random(1, width)]
    inputs.append(random(NUM_TOKENS, width).flip(0))
    return (
        with_gradients(partial(shared_expert_gate.shared_expert_gate, fused=True), inputs),
        with_gradients(partial(shared_expert_gate.shared_expert_gate, fused=False), inputs),
    )


def check_grouped_gemm(config: RunConfig) -> tuple[Results, Results]:
    """Run the grouped GEMMs of fc1 and fc2, an expert without rows included, against one GEMM per expert in fp32."""
    model, width = config.model, _expert_width(config)
    counts = torch.tensor([100, 0, 1, 91], device="cuda")
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    for outputs, inputs in ((2 * width, model.hidden_size), (model.hidden_size, width)):
        operands = [random(NUM_TOKENS, inputs), random(len(counts), outputs, inputs)]
        run = partial(grouped_linear.grouped_linear, rows_per_expert_E=counts, backend="triton")

        def run_by_expert(rows: Tensor, weight: Tensor) -> Tensor:
            blocks = rows.split(counts.tolist())
            return torch.cat([F.linear(b, w) for b, w in zip(blocks, weight.unbind())])

        results[0].extend(with_gradients(run, operands))
        results[1].extend(with_gradients(run_by_expert, [x.float() for x in operands]))
    return results


def check_fp8_experts(config: RunConfig) -> tuple[Results, Results]:
    """Run FP8 experts against bf16 ones, whose kernels have checks of their own."""
    model, tokens, width = config.model, 256, _expert_width(config)
    logits = random(tokens, 4, dtype=torch.float32)
    routing_map = _routing_map(logits, 2)
    inputs = [
        random(tokens, model.hidden_size),
        logits.sigmoid() * routing_map,
        model.hidden_size**-0.5 * random(4, 2 * width, model.hidden_size),
        width**-0.5 * random(4, model.hidden_size, width),
    ]

    def run(fp8: bool, x: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        routes, gates = permutation.plan_routes(routing_map, probs, 2, fused=True)
        counts = routes.rows_per_expert_E
        if fp8:
            return fp8_experts.fp8_experts(x, gates, fc1, fc2, routes, counts)
        rows = permutation.scatter_rows(x, routes, fused=True)
        gate_up = grouped_linear.grouped_linear(rows, fc1, counts, backend="triton")
        hidden = swiglu.swiglu(gate_up, gates, fused=True)
        out = grouped_linear.grouped_linear(hidden, fc2, counts, backend="triton")
        return permutation.gather_rows(out, routes, fused=True)

    return with_gradients(partial(run, True), inputs), with_gradients(partial(run, False), inputs)


def _expert_width(config: RunConfig) -> int:
    return config.model.moe_ffn_hidden_size // config.parallel.expert_tensor_parallel_size


def _routing_map(logits: Tensor, topk: int) -> Tensor:
    """Return the top-k routing map [T,E] of these logits."""
    routing_map = torch.zeros_like(logits, dtype=torch.bool)
    return routing_map.scatter_(1, logits.topk(topk, 1).indices, True)
