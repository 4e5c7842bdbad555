# mypy: allow-untyped-defs
"""Decode router in one kernel: RMSNorm, router GEMM, scores, top-k selection and gates, one program per token.

Launch geometry: grid (T,). A program holds all E scores of its token in registers (EP: E rounded up to a power of
two). With HAS_GEMM it first computes the logits, BLOCK_K input columns × EP experts at a time, from the token itself;
with HAS_NORM it normalizes the token before and stores the normed row for the experts.

Top-k is K steps of a maximum. Score and expert are packed into one integer that orders like the pair (score,
-expert): the bits of the fp32 score, mapped to integers of the same order, times EP, plus EP - 1 - expert. So one
maximum gives the expert, and ties go to the lower index.

Shapes: as in kernels/decode/router.py; EP and KP are E and K rounded up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_q3n.kernels.decode.operands import RMSNormWeights, RouterConfig

# weights of one block, for a program of eight warps: 128 per thread, two in a register
_WEIGHTS_PER_BLOCK = 2**15
NUM_WARPS_GEMM, NUM_WARPS = 8, 4


@triton.jit
def _pack_rank(scores, e, EP: tl.constexpr):
    """Pack score and expert e into an integer that orders by score, then by descending e."""
    bits = scores.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return ordered * EP + (EP - 1 - e).to(tl.int64)


@triton.jit
def _decode_router_kernel(
    logits_ptr,
    x_ptr,
    norm_ptr,
    normed_ptr,
    weight_ptr,
    bias_ptr,
    gates_ptr,
    experts_ptr,
    scaling,
    eps,
    X: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    EP: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_GEMM: tl.constexpr,
    HAS_NORM: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    SIGMOID: tl.constexpr,
    PRE_SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, EP), tl.arange(0, KP)
    expert_mask = e < E
    if HAS_GEMM:
        if X <= BLOCK_K:
            # a single block: its loads are in flight while the norm is computed
            i = tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + token * X + i, mask=i < X, other=0.0).to(tl.float32)
            mask = expert_mask[:, None] & (i < X)[None, :]
            weight_block = tl.load(weight_ptr + e[:, None] * X + i[None, :], mask=mask, other=0.0)
            # without the barrier the assembler places the loads behind the norm
            tl.debug_barrier()
        scale = 1.0
        if HAS_NORM:
            squares = tl.zeros([BLOCK_K], tl.float32)
            for start in range(0, X, BLOCK_K):
                i = start + tl.arange(0, BLOCK_K)
                if X > BLOCK_K:
                    x = tl.load(x_ptr + token * X + i, mask=i < X, other=0.0).to(tl.float32)
                squares += x * x
            scale = tl.rsqrt(tl.sum(squares, axis=0) / X + eps)
        logits = tl.zeros([EP], tl.float32)
        for start in range(0, X, BLOCK_K):
            i = start + tl.arange(0, BLOCK_K)
            if X > BLOCK_K:
                x = tl.load(x_ptr + token * X + i, mask=i < X, other=0.0).to(tl.float32)
            if HAS_NORM:
                norm_scale = WEIGHT_OFFSET + tl.load(norm_ptr + i, mask=i < X, other=0.0).to(tl.float32)
                normed = (x * scale * norm_scale).to(x_ptr.dtype.element_ty)
                tl.store(normed_ptr + token * X + i, normed, mask=i < X)
                x = normed.to(tl.float32)
            if X > BLOCK_K:
                mask = expert_mask[:, None] & (i < X)[None, :]
                weight_block = tl.load(weight_ptr + e[:, None] * X + i[None, :], mask=mask, other=0.0)
            logits += tl.sum(weight_block.to(tl.float32) * x[None, :], axis=1)
    else:
        logits = tl.load(logits_ptr + token * E + e, mask=expert_mask, other=0.0)
    scores = logits
    if SIGMOID:
        scores = tl.sigmoid(logits)
    if PRE_SOFTMAX:
        max_logit = tl.max(tl.where(expert_mask, logits, float("-inf")), axis=0)
        exp_logits = tl.where(expert_mask, tl.exp(logits - max_logit), 0.0)
        scores = exp_logits / tl.sum(exp_logits, axis=0)
    biased_scores = scores
    if HAS_BIAS:
        biased_scores = scores + tl.load(bias_ptr + e, mask=expert_mask, other=0.0)
    lowest_rank: tl.constexpr = -(2**62)
    rank = tl.where(expert_mask, _pack_rank(biased_scores, e, EP), lowest_rank)
    selected = tl.zeros([KP], tl.int32)
    for slot in tl.static_range(K):
        best = tl.max(rank, axis=0)
        expert = (EP - 1 - (best & (EP - 1))).to(tl.int32)
        selected = tl.where(k == slot, expert, selected)
        rank = tl.where(e == expert, lowest_rank, rank)
    is_selected = selected[:, None] == e[None, :]
    gates = tl.sum(tl.where(is_selected, scores[None, :], 0.0), axis=1)
    if SIGMOID:
        if K > 1:
            gates = gates / (tl.sum(tl.where(k < K, gates, 0.0), axis=0) + 1e-20)
    elif not PRE_SOFTMAX:
        max_logit = tl.max(tl.where(k < K, gates, float("-inf")), axis=0)
        exp_logits = tl.where(k < K, tl.exp(gates - max_logit), 0.0)
        gates = exp_logits / tl.sum(exp_logits, axis=0)
    tl.store(gates_ptr + token * K + k, gates * scaling, mask=k < K)
    tl.store(experts_ptr + token * K + k, selected.to(tl.int64), mask=k < K)


def decode_topk(logits_TE: Tensor, config: RouterConfig) -> tuple[Tensor, Tensor]:
    """Select the top-k experts by fp32 logits; returns as `router.decode_route`."""
    (tokens, experts), logits_TE = logits_TE.shape, logits_TE.contiguous()
    gates, selected = _allocate_results(logits_TE, tokens, config)
    _decode_router_kernel[(tokens,)](
        logits_TE,
        None,
        None,
        None,
        None,
        config.bias_E,
        gates,
        selected,
        config.scaling_factor or 1.0,
        0.0,
        **constants(experts, config),
        num_warps=NUM_WARPS,
    )
    return gates, selected


def decode_route(x_TX: Tensor, weight_EX: Tensor, config: RouterConfig) -> tuple[Tensor, Tensor]:
    """Launch router GEMM and selection; arguments and returns as `router.decode_route`, both tensors contiguous."""
    tokens, width = x_TX.shape
    gates, selected = _allocate_results(x_TX, tokens, config)
    _decode_router_kernel[(tokens,)](
        None,
        x_TX,
        None,
        None,
        weight_EX,
        config.bias_E,
        gates,
        selected,
        config.scaling_factor or 1.0,
        0.0,
        **constants(len(weight_EX), config, width),
        num_warps=NUM_WARPS_GEMM,
    )
    return gates, selected


def decode_norm_route(
    x_TX: Tensor, norm: RMSNormWeights, weight_EX: Tensor, config: RouterConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch norm, router GEMM and selection; arguments and returns as `router.decode_norm_route`, both contiguous."""
    tokens, width = x_TX.shape
    gates, selected = _allocate_results(x_TX, tokens, config)
    normed = torch.empty_like(x_TX)
    _decode_router_kernel[(tokens,)](
        None,
        x_TX,
        norm.weight_X,
        normed,
        weight_EX,
        config.bias_E,
        gates,
        selected,
        config.scaling_factor or 1.0,
        norm.eps,
        **constants(len(weight_EX), config, width, norm),
        num_warps=NUM_WARPS_GEMM,
    )
    return normed, gates, selected


def _allocate_results(like: Tensor, tokens: int, config: RouterConfig) -> tuple[Tensor, Tensor]:
    return (
        like.new_empty(tokens, config.topk, dtype=torch.float32),
        like.new_empty(tokens, config.topk, dtype=torch.int64),
    )


def constants(
    num_experts: int, config: RouterConfig, width: int = 0, norm: RMSNormWeights | None = None
) -> dict[str, int | float | bool]:
    """Return the compile-time constants; a width > 0 where the kernel computes the router GEMM."""
    num_padded = max(16, triton.next_power_of_2(num_experts))
    is_sigmoid = config.score_function == "sigmoid"
    return {
        "E": num_experts,
        "K": config.topk,
        "EP": num_padded,
        "KP": triton.next_power_of_2(config.topk),
        "X": width,
        "BLOCK_K": min(_WEIGHTS_PER_BLOCK // num_padded, triton.next_power_of_2(max(16, width))),
        "HAS_GEMM": width > 0,
        "SIGMOID": is_sigmoid,
        "HAS_NORM": norm is not None,
        "WEIGHT_OFFSET": 0.0 if norm is None else norm.offset,
        "PRE_SOFTMAX": config.use_pre_softmax and not is_sigmoid,
        "HAS_BIAS": config.bias_E is not None,
    }
