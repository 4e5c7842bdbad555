# mypy: allow-untyped-defs
"""Decode argmax in two kernels: reduction of vocabulary blocks, then verification of the drafts per sequence.

**Reduce** (grid: N·T rows × cdiv(V, BLOCK_V)): of a block of logits keep the maximum m, Σ exp(x - m), and the argmax
among ids below `limit`. Padding of the vocabulary counts in the sum, but is never the argmax.

**Verify** (grid: N): a program combines all blocks of its sequence's T rows, compares the argmax of each row with the
draft, and writes the accepted tokens, the new token and the log probabilities x - m - log Σ.

Shapes: as in kernels/decode/argmax.py; P blocks per row, TP and PP are T and P rounded up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V, NUM_WARPS = 4096, 8


@triton.jit
def _reduce_kernel(
    logits_ptr, max_ptr, sum_ptr, argmax_value_ptr, argmax_ptr, V, limit, num_blocks, BLOCK_V: tl.constexpr
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = tl.load(logits_ptr + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    row_max = tl.max(logits, axis=0)
    finite_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    allowed = tl.where(v < limit, logits, float("-inf"))
    argmax_value = tl.max(allowed, axis=0)
    # no allowed id in this block, or NaN: some valid id, which loses the comparison
    argmax = tl.min(tl.where((allowed == argmax_value) & (v < limit), v, limit - 1), axis=0)
    offset = row * num_blocks + block
    tl.store(max_ptr + offset, row_max)
    tl.store(sum_ptr + offset, tl.sum(tl.exp(logits - finite_max), axis=0))
    tl.store(argmax_value_ptr + offset, argmax_value)
    tl.store(argmax_ptr + offset, argmax)


@triton.jit
def _verify_kernel(
    logits_ptr,
    drafts_ptr,
    max_ptr,
    sum_ptr,
    argmax_value_ptr,
    argmax_ptr,
    packed_ptr,
    chosen_ptr,
    num_new_tokens_ptr,
    row_ptr,
    V,
    limit,
    num_blocks,
    draft_stride,
    T: tl.constexpr,
    TP: tl.constexpr,
    PP: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    t, p = tl.arange(0, TP), tl.arange(0, PP)
    row = n * T + t
    mask = (t < T)[:, None] & (p < num_blocks)[None, :]
    offset = row[:, None] * num_blocks + p[None, :]
    maxima = tl.load(max_ptr + offset, mask=mask, other=float("-inf"))
    sums = tl.load(sum_ptr + offset, mask=mask, other=0.0)
    argmax_values = tl.load(argmax_value_ptr + offset, mask=mask, other=float("-inf"))
    argmaxes = tl.load(argmax_ptr + offset, mask=mask, other=0)
    row_max = tl.max(maxima, axis=1)
    finite_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.sum(sums * tl.exp(maxima - finite_max[:, None]), axis=1)
    argmax_value = tl.max(argmax_values, axis=1)
    candidates = tl.where((argmax_values == argmax_value[:, None]) & mask, argmaxes, limit - 1)
    # blocks are in the order of their ids
    argmax = tl.min(candidates, axis=1).to(tl.int64)
    draft = tl.load(drafts_ptr + n * draft_stride + t, mask=t < T - 1, other=0)
    is_accepted = (t < T - 1) & (argmax == draft)
    num_accepted = tl.min(tl.where(is_accepted, T - 1, tl.minimum(t, T - 1)), axis=0)
    chosen = tl.where(t == num_accepted, argmax, draft)
    logit = tl.load(logits_ptr + row * V + chosen, mask=t < T, other=0.0).to(tl.float32)
    logprob = logit - finite_max - tl.log(row_sum)
    packed_ptr += n * (1 + 3 * T)
    tl.store(packed_ptr, num_accepted.to(tl.float64))
    tl.store(packed_ptr + 1 + t, chosen.to(tl.float64), mask=t < T)
    tl.store(packed_ptr + 1 + T + t, logprob.to(tl.float64), mask=t < T)
    tl.store(packed_ptr + 1 + 2 * T + t, tl.zeros([TP], tl.float64), mask=t < T)
    tl.store(chosen_ptr + row, chosen, mask=t < T)
    tl.store(num_new_tokens_ptr + n, (num_accepted + 1).to(tl.int64))
    tl.store(row_ptr + n, n * T + num_accepted)


@triton.jit
def _argmax_kernel(logits_ptr, out_ptr, logits_stride, out_stride, limit, BLOCK_V: tl.constexpr):
    n, v = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_V)
    mask = v < limit
    logits = tl.load(logits_ptr + n * logits_stride + v, mask=mask, other=float("-inf"))
    logits = logits.to(tl.float32)
    # NaN: the last valid id
    is_best = mask & (logits == tl.max(logits, axis=0))
    argmax = tl.min(tl.where(is_best, v, limit - 1), axis=0)
    tl.store(out_ptr + n * out_stride, argmax.to(tl.int64))


def greedy_token(logits_NV: Tensor, out_N: Tensor, limit: int) -> None:
    """Launch the argmax, one program per row; arguments as `argmax.greedy_token`, ids below `limit`."""
    assert logits_NV.stride(1) == 1
    _argmax_kernel[(len(logits_NV),)](
        logits_NV,
        out_N,
        logits_NV.stride(0),
        out_N.stride(0),
        limit,
        BLOCK_V=triton.next_power_of_2(limit),
        num_warps=NUM_WARPS,
    )


def verify_greedy(logits_NTV: Tensor, drafts_ND: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch both kernels; arguments as `argmax.verify_greedy`, ids below `limit`.

    Returns: packed, chosen, num_new_tokens and row, as in `VerifiedDrafts`.
    """
    rows, argmaxes, vocab = logits_NTV.shape
    assert drafts_ND.shape == (rows, argmaxes - 1)
    assert argmaxes == 1 or drafts_ND.stride(1) == 1
    num_blocks = triton.cdiv(vocab, BLOCK_V)
    row_max = logits_NTV.new_empty(rows * argmaxes, num_blocks, dtype=torch.float32)
    row_sum, argmax_value = torch.empty_like(row_max), torch.empty_like(row_max)
    argmax = torch.empty_like(row_max, dtype=torch.int32)
    _reduce_kernel[(rows * argmaxes, num_blocks)](
        logits_NTV,
        row_max,
        row_sum,
        argmax_value,
        argmax,
        vocab,
        limit,
        num_blocks,
        BLOCK_V=BLOCK_V,
        num_warps=NUM_WARPS,
    )
    packed = row_max.new_empty(rows, 1 + 3 * argmaxes, dtype=torch.float64)
    chosen = drafts_ND.new_empty(rows, argmaxes)
    num_new_tokens, row = drafts_ND.new_empty(rows), drafts_ND.new_empty(rows)
    _verify_kernel[(rows,)](
        logits_NTV,
        drafts_ND,
        row_max,
        row_sum,
        argmax_value,
        argmax,
        packed,
        chosen,
        num_new_tokens,
        row,
        vocab,
        limit,
        num_blocks,
        drafts_ND.stride(0),
        T=argmaxes,
        TP=triton.next_power_of_2(argmaxes),
        PP=triton.next_power_of_2(num_blocks),
        num_warps=4,
    )
    return packed, chosen, num_new_tokens, row
