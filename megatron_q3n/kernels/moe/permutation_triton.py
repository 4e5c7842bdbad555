# mypy: allow-untyped-defs
"""MoE token permutation for hundreds of experts, without a sort and without host synchronization.

A routing map [T,E] gives the K experts of each token. `plan` computes the row of each (token, expert) pair in the
permuted buffer: rows of expert 0 first, within an expert by token, so the order never depends on timing. Three kernels:
count per block of BLOCK_T tokens, exclusive prefix sum over the blocks, and row indices within each block. Then

- `scatter_rows` copies each token to its K rows (the token is read once), and
- `gather_rows` sums a token's K rows, in fp32 and in slot order (unpermute);

each is the other's backward pass. Both run one program per token, BLOCK_H columns at a time.

T tokens, E experts, K experts per token, R = T·K rows, H width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_T = 32
_BLOCK_H = 2048
# experts per program of the prefix sum
_EXPERTS_PER_SCAN = 8


@triton.jit
def _count_kernel(map_ptr, counts_ptr, tokens, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    mask = (t < tokens)[:, None] & (e < EXPERTS)[None, :]
    is_routed = tl.load(map_ptr + t[:, None] * EXPERTS + e[None, :], mask=mask, other=0).to(tl.int32)
    tl.store(counts_ptr + tl.program_id(0) * EXPERTS + e, tl.sum(is_routed, axis=0), mask=e < EXPERTS)


@triton.jit
def _scan_kernel(counts_ptr, rows_ptr, blocks, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr):
    """Replace counts [blocks,E] by each block's first row (exclusive prefix sum), and sum the rows per expert.

    One program has BLOCK_E experts. torch's cumsum along the outer dimension takes 0.09 ms for 0.3 MB, one program for
    all experts 0.04 ms.
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    expert_mask = (e < EXPERTS)[None, :]
    num_rows = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, blocks, CHUNK):
        b = start + tl.arange(0, CHUNK)
        mask = (b < blocks)[:, None] & expert_mask
        offset = counts_ptr + b[:, None] * EXPERTS + e[None, :]
        counts = tl.load(offset, mask=mask, other=0)
        tl.store(offset, num_rows[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask)
        num_rows += tl.sum(counts, axis=0)
    tl.store(rows_ptr + e, num_rows, mask=e < EXPERTS)


@triton.jit
def _row_index_kernel(
    map_ptr,
    probs_ptr,
    first_row_ptr,
    rows_ptr,
    row_ptr,
    expert_ptr,
    token_ptr,
    gate_ptr,
    tokens,
    EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    mask = (t < tokens)[:, None] & (e < EXPERTS)[None, :]
    source = t[:, None] * EXPERTS + e[None, :]
    is_routed = tl.load(map_ptr + source, mask=mask, other=0).to(tl.int32)
    rows = tl.load(rows_ptr + e, mask=e < EXPERTS, other=0)
    first_row = tl.load(first_row_ptr + tl.program_id(0) * EXPERTS + e, mask=e < EXPERTS, other=0)
    first_row += tl.cumsum(rows, axis=0) - rows
    row = first_row[None, :] + tl.cumsum(is_routed, axis=0) - is_routed
    slot = tl.cumsum(is_routed, axis=1) - is_routed
    slot_mask = mask & (is_routed > 0) & (slot < TOPK)
    offset = t[:, None] * TOPK + slot
    tl.store(row_ptr + offset, row, mask=slot_mask)
    tl.store(expert_ptr + offset, tl.broadcast_to(e[None, :], (BLOCK_T, BLOCK_E)), mask=slot_mask)
    tl.store(token_ptr + row, tl.broadcast_to(t[:, None], (BLOCK_T, BLOCK_E)), mask=slot_mask)
    gate = tl.load(probs_ptr + source, mask=slot_mask, other=0.0)
    tl.store(gate_ptr + row, gate, mask=slot_mask)


@triton.jit
def _scatter_kernel(x_ptr, row_ptr, out_ptr, WIDTH: tl.constexpr, TOPK: tl.constexpr, BLOCK_H: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    for start in tl.static_range(0, WIDTH, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + t * WIDTH + h, mask=h < WIDTH)
        for slot in tl.static_range(TOPK):
            row = tl.load(row_ptr + t * TOPK + slot).to(tl.int64)
            tl.store(out_ptr + row * WIDTH + h, x, mask=h < WIDTH)


@triton.jit
def _gather_kernel(
    rows_ptr,
    row_ptr,
    add_ptr,
    out_ptr,
    HAS_ADD: tl.constexpr,
    WIDTH: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    for start in tl.static_range(0, WIDTH, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        total = tl.zeros((BLOCK_H,), tl.float32)
        for slot in tl.static_range(TOPK):
            row = tl.load(row_ptr + t * TOPK + slot).to(tl.int64)
            total += tl.load(rows_ptr + row * WIDTH + h, mask=h < WIDTH, other=0.0).to(tl.float32)
        if HAS_ADD:
            total += tl.load(add_ptr + t * WIDTH + h, mask=h < WIDTH, other=0.0).to(tl.float32)
        tl.store(out_ptr + t * WIDTH + h, total.to(out_ptr.dtype.element_ty), mask=h < WIDTH)


@triton.jit
def _gate_gradient_kernel(
    dgate_ptr, row_ptr, expert_ptr, dprobs_ptr, slots, EXPERTS: tl.constexpr, TOPK: tl.constexpr, BLOCK: tl.constexpr
):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < slots
    row = tl.load(row_ptr + offset, mask=mask, other=0)
    expert = tl.load(expert_ptr + offset, mask=mask, other=0)
    gradient = tl.load(dgate_ptr + row, mask=mask, other=0.0)
    tl.store(dprobs_ptr + (offset // TOPK).to(tl.int64) * EXPERTS + expert, gradient, mask=mask)


def rows_per_expert(counts_BE: Tensor) -> Tensor:
    """Sum the counts of blocks of tokens, and replace each by its block's first row. Returns: [E] int32."""
    blocks, experts = counts_BE.shape
    rows_E = torch.empty(experts, dtype=torch.int32, device=counts_BE.device)
    _scan_kernel[(triton.cdiv(experts, _EXPERTS_PER_SCAN),)](
        counts_BE, rows_E, blocks, EXPERTS=experts, BLOCK_E=_EXPERTS_PER_SCAN, CHUNK=512, num_warps=8
    )
    return rows_E


def plan(map_TE: Tensor, probs_TE: Tensor, topk: int) -> tuple[Tensor, ...]:
    """Compute the row indices. Every token must have exactly `topk` experts.

    Returns: row [T,K] and expert [T,K] of each slot (int32, experts ascending), token [R] and gate
        [R] of each row, rows per expert [E] (int32); all on the device.
    """
    tokens, experts = map_TE.shape
    blocks = triton.cdiv(tokens, _BLOCK_T)
    options = {"EXPERTS": experts, "BLOCK_T": _BLOCK_T, "BLOCK_E": triton.next_power_of_2(experts), "num_warps": 8}
    counts_BE = torch.empty(blocks, experts, dtype=torch.int32, device=map_TE.device)
    _count_kernel[(blocks,)](map_TE, counts_BE, tokens, **options)
    rows_per_expert_E = rows_per_expert(counts_BE)
    row_TK, expert_TK = (torch.empty(tokens, topk, dtype=torch.int32, device=map_TE.device) for _ in "re")
    token_R = torch.empty(tokens * topk, dtype=torch.int32, device=map_TE.device)
    gate_R = probs_TE.new_empty(tokens * topk)
    _row_index_kernel[(blocks,)](
        map_TE, probs_TE, counts_BE, rows_per_expert_E, row_TK, expert_TK, token_R, gate_R, tokens, TOPK=topk, **options
    )
    return row_TK, expert_TK, token_R, gate_R, rows_per_expert_E


def scatter_rows(x_TH: Tensor, row_TK: Tensor) -> Tensor:
    """Copy each token to its rows. Returns: [R,H]."""
    tokens, width = x_TH.shape
    out = x_TH.new_empty(row_TK.numel(), width)
    _scatter_kernel[(tokens,)](
        x_TH,
        row_TK,
        out,
        WIDTH=width,
        TOPK=row_TK.shape[1],
        BLOCK_H=min(_BLOCK_H, triton.next_power_of_2(width)),
        num_warps=8,
    )
    return out


def gather_rows(rows_RH: Tensor, row_TK: Tensor, add_TH: Tensor | None = None) -> Tensor:
    """Sum each token's rows, and `add` where it is not None. Returns: [T,H]."""
    tokens, width = row_TK.shape[0], rows_RH.shape[1]
    out = rows_RH.new_empty(tokens, width)
    _gather_kernel[(tokens,)](
        rows_RH,
        row_TK,
        add_TH,
        out,
        HAS_ADD=add_TH is not None,
        WIDTH=width,
        TOPK=row_TK.shape[1],
        BLOCK_H=min(_BLOCK_H, triton.next_power_of_2(width)),
        num_warps=8,
    )
    return out


def gate_gradient(dgate_R: Tensor, row_TK: Tensor, expert_TK: Tensor, experts: int) -> Tensor:
    """Scatter the gradient of each row's gate to the dense probabilities. Returns: [T,E]."""
    dprobs = dgate_R.new_zeros(row_TK.shape[0], experts)
    _gate_gradient_kernel[(triton.cdiv(row_TK.numel(), 1024),)](
        dgate_R, row_TK, expert_TK, dprobs, row_TK.numel(), EXPERTS=experts, TOPK=row_TK.shape[1], BLOCK=1024
    )
    return dprobs
