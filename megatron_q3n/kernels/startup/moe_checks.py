"""Start-up checks of the MoE kernels: permutation, SwiGLU, shared-expert gate, grouped GEMM, FP8 experts.

Each check returns the results of the fused kernel and of the reference; `qualification.py` compares them.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.config import RunConfig
from megatron_q3n.kernels.moe import fp8_experts, grouped_linear, permutation, shared_expert_gate, swiglu
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
