# mypy: allow-untyped-defs
"""Greedy decoding's reading of the logits in two launches: pieces of the vocabulary, then all of a sequence's.

Of a piece of a token's logits there remain the largest, the sum of exponentials below it, and the likeliest token that
may be taken; padding of the vocabulary counts in the sum and is not taken.

Shapes: as in kernels/decode/argmax.py; P pieces, TP and PP are T and P rounded up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE, WARPS_OF_PIECES = 4096, 8


@triton.jit
def _pieces_kernel(logits_ptr, top_ptr, total_ptr, best_ptr, token_ptr, V, limit, pieces, PIECE: tl.constexpr):
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = piece * PIECE + tl.arange(0, PIECE)
    logits = tl.load(logits_ptr + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    top = tl.max(logits, axis=0)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    allowed = tl.where(v < limit, logits, float("-inf"))
    best = tl.max(allowed, axis=0)
    # nothing to take, or not a number: a token that loses, and is one
    token = tl.min(tl.where((allowed == best) & (v < limit), v, limit - 1), axis=0)
    place = row * pieces + piece
    tl.store(top_ptr + place, top)
    tl.store(total_ptr + place, tl.sum(tl.exp(logits - anchor), axis=0))
    tl.store(best_ptr + place, best)
    tl.store(token_ptr + place, token)


@triton.jit
def _judge_kernel(
    logits_ptr,
    drafts_ptr,
    top_ptr,
    total_ptr,
    best_ptr,
    token_ptr,
    packed_ptr,
    chosen_ptr,
    grown_ptr,
    row_ptr,
    V,
    limit,
    pieces,
    draft_stride,
    T: tl.constexpr,
    TP: tl.constexpr,
    PP: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    t, p = tl.arange(0, TP), tl.arange(0, PP)
    row = n * T + t
    there = (t < T)[:, None] & (p < pieces)[None, :]
    place = row[:, None] * pieces + p[None, :]
    tops = tl.load(top_ptr + place, mask=there, other=float("-inf"))
    totals = tl.load(total_ptr + place, mask=there, other=0.0)
    bests = tl.load(best_ptr + place, mask=there, other=float("-inf"))
    tokens = tl.load(token_ptr + place, mask=there, other=0)
    top = tl.max(tops, axis=1)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(totals * tl.exp(tops - anchor[:, None]), axis=1)
    best = tl.max(bests, axis=1)
    likeliest = tl.where((bests == best[:, None]) & there, tokens, limit - 1)
    token = tl.min(likeliest, axis=1).to(tl.int64)  # pieces are in the order of their tokens
    draft = tl.load(drafts_ptr + n * draft_stride + t, mask=t < T - 1, other=0)
    stays = (t < T - 1) & (token == draft)
    kept = tl.min(tl.where(stays, T - 1, tl.minimum(t, T - 1)), axis=0)
    chosen = tl.where(t == kept, token, draft)
    logit = tl.load(logits_ptr + row * V + chosen, mask=t < T, other=0.0).to(tl.float32)
    own = logit - anchor - tl.log(total)
    packed_ptr += n * (1 + 3 * T)
    tl.store(packed_ptr, kept.to(tl.float64))
    tl.store(packed_ptr + 1 + t, chosen.to(tl.float64), mask=t < T)
    tl.store(packed_ptr + 1 + T + t, own.to(tl.float64), mask=t < T)
    tl.store(packed_ptr + 1 + 2 * T + t, tl.zeros([TP], tl.float64), mask=t < T)
    tl.store(chosen_ptr + row, chosen, mask=t < T)
    tl.store(grown_ptr + n, (kept + 1).to(tl.int64))
    tl.store(row_ptr + n, n * T + kept)


@triton.jit
def _likeliest_kernel(logits_ptr, out_ptr, logits_stride, out_stride, limit, BLOCK: tl.constexpr):
    n, v = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = v < limit
    logits = tl.load(logits_ptr + n * logits_stride + v, mask=there, other=float("-inf"))
    logits = logits.to(tl.float32)
    # not a number: the last token, which is one
    is_best = there & (logits == tl.max(logits, axis=0))
    token = tl.min(tl.where(is_best, v, limit - 1), axis=0)
    tl.store(out_ptr + n * out_stride, token.to(tl.int64))


def take_likeliest(logits_NV: Tensor, out_N: Tensor, limit: int) -> None:
    """Choose, as `kernels.take_likeliest`: a program has a whole row."""
    assert logits_NV.stride(1) == 1
    _likeliest_kernel[(len(logits_NV),)](
        logits_NV,
        out_N,
        logits_NV.stride(0),
        out_N.stride(0),
        limit,
        BLOCK=triton.next_power_of_2(limit),
        num_warps=WARPS_OF_PIECES,
    )


def judge_likeliest(logits_NTV: Tensor, drafts_ND: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Judge; shapes as `kernels.judge_likeliest`, tokens below `limit` may be taken.

    Returns: packed, chosen, grown and row, as `Judged` has them.
    """
    rows, tokens, vocab = logits_NTV.shape
    assert drafts_ND.shape == (rows, tokens - 1)
    assert tokens == 1 or drafts_ND.stride(1) == 1
    pieces = triton.cdiv(vocab, PIECE)
    top = logits_NTV.new_empty(rows * tokens, pieces, dtype=torch.float32)
    total, best = torch.empty_like(top), torch.empty_like(top)
    token = torch.empty_like(top, dtype=torch.int32)
    _pieces_kernel[(rows * tokens, pieces)](
        logits_NTV, top, total, best, token, vocab, limit, pieces, PIECE=PIECE, num_warps=WARPS_OF_PIECES
    )
    packed = top.new_empty(rows, 1 + 3 * tokens, dtype=torch.float64)
    chosen = drafts_ND.new_empty(rows, tokens)
    grown, row = drafts_ND.new_empty(rows), drafts_ND.new_empty(rows)
    _judge_kernel[(rows,)](
        logits_NTV,
        drafts_ND,
        top,
        total,
        best,
        token,
        packed,
        chosen,
        grown,
        row,
        vocab,
        limit,
        pieces,
        drafts_ND.stride(0),
        T=tokens,
        TP=triton.next_power_of_2(tokens),
        PP=triton.next_power_of_2(pieces),
        num_warps=4,
    )
    return packed, chosen, grown, row
