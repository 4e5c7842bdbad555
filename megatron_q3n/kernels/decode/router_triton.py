# mypy: allow-untyped-defs
"""Which experts a few tokens go to, in one launch: a program has a token, all scores of it in registers.

Where the norm is asked for too, a program norms its token and stores it for the experts.
The highest score is taken out K times. Score and expert are one number to compare, the score's bits in an
order that integers have too, then the expert, counted down, so that a maximum alone says which, ties included.

Shapes: as in kernels/decode/router.py; EP and KP are E and K rounded up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_q3n.kernels.decode.gemm import RowNorm
from megatron_q3n.kernels.decode.router import Choice

_WEIGHTS_AT_ONCE = 2**15  # of a program of eight warps: 128 of each thread, two in a register
WARPS_OF_PRODUCT, WARPS = 8, 4


@triton.jit
def _ranked(scores, e, EP: tl.constexpr):
    """Make of each score and its expert an integer that is the greater, the higher the score and the lower e."""
    bits = scores.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return ordered * EP + (EP - 1 - e).to(tl.int64)


@triton.jit
def _few_routes_kernel(
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
    BLOCK: tl.constexpr,
    PRODUCT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    SIGMOID: tl.constexpr,
    PRE_SOFTMAX: tl.constexpr,
    BIASED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, EP), tl.arange(0, KP)
    exists = e < E
    if PRODUCT:
        if X <= BLOCK:  # all weights are under way while the norm is taken
            i = tl.arange(0, BLOCK)
            x = tl.load(x_ptr + token * X + i, mask=i < X, other=0.0).to(tl.float32)
            mask = exists[:, None] & (i < X)[None, :]
            piece = tl.load(weight_ptr + e[:, None] * X + i[None, :], mask=mask, other=0.0)
            tl.debug_barrier()  # or the assembler would load them behind it
        scale = 1.0
        if HAS_NORM:
            squares = tl.zeros([BLOCK], tl.float32)
            for start in range(0, X, BLOCK):
                i = start + tl.arange(0, BLOCK)
                if X > BLOCK:
                    x = tl.load(x_ptr + token * X + i, mask=i < X, other=0.0).to(tl.float32)
                squares += x * x
            scale = tl.rsqrt(tl.sum(squares, axis=0) / X + eps)
        logits = tl.zeros([EP], tl.float32)
        for start in range(0, X, BLOCK):
            i = start + tl.arange(0, BLOCK)
            if X > BLOCK:
                x = tl.load(x_ptr + token * X + i, mask=i < X, other=0.0).to(tl.float32)
            if HAS_NORM:
                by = OFFSET + tl.load(norm_ptr + i, mask=i < X, other=0.0).to(tl.float32)
                normed = (x * scale * by).to(x_ptr.dtype.element_ty)
                tl.store(normed_ptr + token * X + i, normed, mask=i < X)
                x = normed.to(tl.float32)
            if X > BLOCK:
                mask = exists[:, None] & (i < X)[None, :]
                piece = tl.load(weight_ptr + e[:, None] * X + i[None, :], mask=mask, other=0.0)
            logits += tl.sum(piece.to(tl.float32) * x[None, :], axis=1)
    else:
        logits = tl.load(logits_ptr + token * E + e, mask=exists, other=0.0)
    scores = logits
    if SIGMOID:
        scores = tl.sigmoid(logits)
    if PRE_SOFTMAX:
        highest = tl.max(tl.where(exists, logits, float("-inf")), axis=0)
        raised = tl.where(exists, tl.exp(logits - highest), 0.0)
        scores = raised / tl.sum(raised, axis=0)
    ranked = scores
    if BIASED:
        ranked = scores + tl.load(bias_ptr + e, mask=exists, other=0.0)
    least: tl.constexpr = -(2**62)
    rank = tl.where(exists, _ranked(ranked, e, EP), least)
    chosen = tl.zeros([KP], tl.int32)
    for slot in tl.static_range(K):
        best = tl.max(rank, axis=0)
        expert = (EP - 1 - (best & (EP - 1))).to(tl.int32)
        chosen = tl.where(k == slot, expert, chosen)
        rank = tl.where(e == expert, least, rank)
    is_chosen = chosen[:, None] == e[None, :]
    gates = tl.sum(tl.where(is_chosen, scores[None, :], 0.0), axis=1)
    if SIGMOID:
        if K > 1:
            gates = gates / (tl.sum(tl.where(k < K, gates, 0.0), axis=0) + 1e-20)
    elif not PRE_SOFTMAX:
        highest = tl.max(tl.where(k < K, gates, float("-inf")), axis=0)
        raised = tl.where(k < K, tl.exp(gates - highest), 0.0)
        gates = raised / tl.sum(raised, axis=0)
    tl.store(gates_ptr + token * K + k, gates * scaling, mask=k < K)
    tl.store(experts_ptr + token * K + k, chosen.to(tl.int64), mask=k < K)


def choose_few(logits_TE: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Choose by fp32 scores; returns as `kernels.route_few`."""
    (tokens, experts), logits_TE = logits_TE.shape, logits_TE.contiguous()
    gates, chosen = _results(logits_TE, tokens, choice)
    _few_routes_kernel[(tokens,)](
        logits_TE,
        None,
        None,
        None,
        None,
        choice.bias_E,
        gates,
        chosen,
        choice.scaling_factor or 1.0,
        0.0,
        **constants(experts, choice),
        num_warps=WARPS,
    )
    return gates, chosen


def route_few(x_TX: Tensor, weight_EX: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Score and choose; shapes and returns as `kernels.route_few`, both tensors contiguous."""
    tokens, width = x_TX.shape
    gates, chosen = _results(x_TX, tokens, choice)
    _few_routes_kernel[(tokens,)](
        None,
        x_TX,
        None,
        None,
        weight_EX,
        choice.bias_E,
        gates,
        chosen,
        choice.scaling_factor or 1.0,
        0.0,
        **constants(len(weight_EX), choice, width),
        num_warps=WARPS_OF_PRODUCT,
    )
    return gates, chosen


def norm_and_route_few(x_TX: Tensor, norm: RowNorm, weight_EX: Tensor, choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, score and choose; shapes and returns as `kernels.norm_and_route_few`, both tensors contiguous."""
    tokens, width = x_TX.shape
    gates, chosen = _results(x_TX, tokens, choice)
    normed = torch.empty_like(x_TX)
    _few_routes_kernel[(tokens,)](
        None,
        x_TX,
        norm.weight_X,
        normed,
        weight_EX,
        choice.bias_E,
        gates,
        chosen,
        choice.scaling_factor or 1.0,
        norm.eps,
        **constants(len(weight_EX), choice, width, norm),
        num_warps=WARPS_OF_PRODUCT,
    )
    return normed, gates, chosen


def _results(like: Tensor, tokens: int, choice: Choice) -> tuple[Tensor, Tensor]:
    return (
        like.new_empty(tokens, choice.topk, dtype=torch.float32),
        like.new_empty(tokens, choice.topk, dtype=torch.int64),
    )


def constants(
    num_experts: int, choice: Choice, width: int = 0, norm: RowNorm | None = None
) -> dict[str, int | float | bool]:
    """Return what is compiled into the kernel; a width where it has the router's product to make."""
    padded = max(16, triton.next_power_of_2(num_experts))
    is_sigmoid = choice.score_function == "sigmoid"
    return {
        "E": num_experts,
        "K": choice.topk,
        "EP": padded,
        "KP": triton.next_power_of_2(choice.topk),
        "X": width,
        "BLOCK": min(_WEIGHTS_AT_ONCE // padded, triton.next_power_of_2(max(16, width))),
        "PRODUCT": width > 0,
        "SIGMOID": is_sigmoid,
        "HAS_NORM": norm is not None,
        "OFFSET": 0.0 if norm is None else norm.offset,
        "PRE_SOFTMAX": choice.use_pre_softmax and not is_sigmoid,
        "BIASED": choice.bias_E is not None,
    }
