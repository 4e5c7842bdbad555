"""Start-up checks of the decode kernels: GEMM, attention, router, experts, argmax. None has gradients.

Each check returns the results of the fused kernel and of the reference; `qualification.py` compares them.
"""

from functools import partial
from itertools import product

import torch
from torch import Tensor

from megatron_q3n.config import RunConfig
from megatron_q3n.kernels.decode import argmax, attention, experts, gemm, router
from megatron_q3n.kernels.decode.operands import (
    AttentionHeads,
    ExpertWeights,
    GemmInput,
    QKNormWeights,
    RMSNormWeights,
    RouterConfig,
)
from megatron_q3n.kernels.startup.check_inputs import Results, random, random_matrix


def check_decode_gemm(config: RunConfig) -> tuple[Results, Results]:
    """Run the GEMMs of a layer, of the MTP layer and of the LM head for three rows, with norms and residuals."""
    model = config.model
    width, inner, rows = model.hidden_size, model.value_dim, 3
    norms = [RMSNormWeights(0.1 * random(width + i)[i:], 1e-6) for i in range(2)]
    first, second = (GemmInput(x, norm) for x, norm in zip(3 * random(2, rows, width), norms))
    in_proj, second_weight = random_matrix(2 * model.key_dim + 2 * inner, width), random_matrix(72, width)
    out_proj, eh_proj = random_matrix(width, inner), random_matrix(width, 2 * width)
    plain, head = GemmInput(random(rows, inner)), random_matrix(model.vocab_size, width)

    def run(fused: bool) -> list[Tensor]:
        multiply = partial(gemm.decode_gemm, fused=fused)
        outputs = [
            multiply(first, in_proj, second_weight_MK=second_weight),
            multiply(plain, out_proj, residual_RN=second.x_RX),
            multiply(first, eh_proj, second=second),
            multiply(first, head, returns_normed=True),
            multiply(second, second_weight, returns_normed=True, fp32_output=True),
        ]
        tensors = [(output.out_RN, output.second_out_RM, output.normed_RX) for output in outputs]
        return [tensor for output in tensors for tensor in output if tensor is not None]

    return run(True), run(False)


def check_decode_attention(config: RunConfig) -> tuple[Results, Results]:
    """Run decode attention after no, few and several blocks of cached keys: outputs, and the caches."""
    model, tp_size, max_start = config.model, config.parallel.tensor_model_parallel_size, 300
    num_groups, head_dim = max(1, model.num_query_groups // tp_size), model.kv_channels
    queries_per_group = max(1, model.num_attention_heads // tp_size // num_groups)
    is_gated = model.gate_is_in_query_projection
    norms = QKNormWeights(0.1 * random(head_dim), 0.1 * random(head_dim + 1)[1:], 1e-6)
    angles = random(max_start + 16, model.rotary_dim // 2, dtype=torch.float32)
    rotary = torch.cat([angles.cos(), angles.cos(), -angles.sin(), angles.sin()], 1).bfloat16()
    start = torch.tensor([0, 3, max_start], device="cuda")
    heads_per_group = (1 + is_gated) * queries_per_group + 2
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    for window, tokens in product({None, model.attention_window_tokens}, (1, 5)):
        heads = AttentionHeads(num_groups, queries_per_group, head_dim, is_gated, head_dim**-0.5, window)
        qkv = random(tokens, 3, num_groups * heads_per_group * head_dim)
        shape = 3, num_groups, max_start + 8, head_dim
        caches = [random(*shape), random(*shape).flip(2)]
        for fused, result in zip((True, False), results):
            key, value = (cache.clone() for cache in caches)
            operands = qkv, heads, norms, rotary, start, max_start, key, value
            result.extend([attention.decode_attention(*operands, fused=fused), key, value])
    return results


def check_decode_router(config: RunConfig) -> tuple[Results, Results]:
    """Run the decode router for three tokens: gates at their experts' indices, and the normed tokens."""
    model, options = config.model, config.model.megatron
    num_experts, width = model.num_moe_experts, model.hidden_size
    routing = RouterConfig(
        model.moe_router_topk,
        options.get("moe_router_score_function", "softmax"),
        options.get("moe_router_pre_softmax", False),
        options.get("moe_router_topk_scaling_factor"),
        random(num_experts, dtype=torch.float32) if model.moe_router_enable_expert_bias else None,
    )
    x, weight = random(3, width), width**-0.5 * random(num_experts, width)
    norm = RMSNormWeights(0.1 * random(width), model.layernorm_epsilon)

    def run(fused: bool) -> list[Tensor]:
        normed, *routes = router.decode_norm_route(3 * x, norm, weight, routing, fused=fused)
        pairs = [routes, router.decode_route(x, weight, routing, fused=fused)]
        zeros = torch.zeros(3, num_experts, device="cuda")
        return [normed, *(zeros.scatter(1, selected, gates) for gates, selected in pairs)]

    return run(True), run(False)


def check_decode_experts(config: RunConfig) -> tuple[Results, Results]:
    """Run the decode experts for three tokens with four experts, two tokens sharing an expert."""
    model, tokens = config.model, 3
    width = model.moe_ffn_hidden_size // config.parallel.expert_tensor_parallel_size
    shared = model.moe_shared_expert_intermediate_size or 0
    fc1, fc2 = random_matrix(4, 2 * width, model.hidden_size), random_matrix(4, model.hidden_size, width)
    weights = ExpertWeights(fc1, fc2)
    if shared:
        shared_fc1, shared_fc2 = random_matrix(2 * shared, model.hidden_size), random_matrix(model.hidden_size, shared)
        weights = ExpertWeights(fc1, fc2, shared_fc1, shared_fc2, random_matrix(1, model.hidden_size))
    selected = torch.tensor([[0, 3], [2, 1], [3, 2]], device="cuda")
    gates = random(tokens, 2, dtype=torch.float32).sigmoid()
    x = random(tokens, model.hidden_size)
    run = partial(experts.decode_experts, x, 0.1 * x.flip(0), selected, gates, weights)
    return [run(fused=True)], [run(fused=False)]


def check_decode_argmax(config: RunConfig) -> tuple[Results, Results]:
    """Run greedy verification: two sequences whose second draft is rejected, and one whose drafts are all accepted."""
    vocab = config.model.vocab_size
    logits = random(3, 3, vocab)
    top_tokens = torch.arange(9, device="cuda").view(3, 3, 1) * (vocab - 1) // 8
    # a unique maximum: of equal logits torch may take another token
    logits.scatter_(2, top_tokens, 9.0)
    drafts = logits.float().argmax(-1)[:, :2].contiguous()
    drafts[:2, 1] = (drafts[:2, 1] + 1) % vocab
    results = []
    for fused in (True, False):
        verified = argmax.verify_greedy(logits, drafts, vocab, fused=fused)
        # integers apart from log probabilities: the size of a token id would hide an error of a log probability
        logprobs, next_drafts = verified.packed[:, 4:7], torch.zeros_like(drafts)
        argmax.greedy_token(logits[:, 1], next_drafts[:, 1], vocab, fused=fused)
        results.append([logprobs, verified.chosen_NT, verified.num_new_tokens_N, verified.row_N, next_drafts])
    return results[0], results[1]
