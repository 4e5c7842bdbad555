# mypy: allow-untyped-defs
"""Expert-parallel dispatch and combine over peer memory: every rank pulls rows from its peers, no host involved.

Each rank publishes its tokens, routing map and gates in memory that its peers can read (symmetric memory over NVLink).
After a barrier every rank computes the rows of its own experts from all ranks' routing maps, and pulls each token that
one of them needs once, into all its rows. Results go back as one weighted partial sum per token, formed on the experts'
rank; the token's rank pulls the partial sums and adds them in fp32. So a token crosses the network at most once per
destination rank in each direction.

    dispatch   rows[row(s, k)] = x[s]              combine   y[t] = Σ_ranks Σ_k rows[row(t, k)]

Each is the other's backward pass. Rows are sorted by expert, then by source rank and token, so the order never depends
on timing. Rows beyond the capacity are left out (`-1`) and noticed by their number (`clamp_rows`).

Peers are tables of addresses, one int64 per rank; tests and qualification give addresses in one process.

Launch geometry: one program per token for rows and sums; BLOCK_T tokens for the plan and for the gates.
W ranks, T tokens of a rank, S = W·T tokens of all, E experts, L = E/W local ones, K experts per token, C rows, H width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_q3n.kernels.moe.permutation_triton import rows_per_expert

_BLOCK_T = 32
_BLOCK_H = 2048


@triton.jit
def _count_kernel(
    map_ptrs,
    counts_ptr,
    tokens,
    blocks_per_rank,
    first_expert,
    EXPERTS: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    block = tl.program_id(0)
    map_ptr = tl.load(map_ptrs + block // blocks_per_rank).to(tl.pointer_type(tl.uint8))
    t = (block % blocks_per_rank) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    mask = (t < tokens)[:, None] & (e < LOCAL)[None, :]
    is_routed = tl.load(map_ptr + t[:, None] * EXPERTS + first_expert + e[None, :], mask=mask, other=0).to(tl.int32)
    tl.store(counts_ptr + block * LOCAL + e, tl.sum(is_routed, axis=0), mask=e < LOCAL)


@triton.jit
def _row_index_kernel(
    map_ptrs,
    probs_ptrs,
    first_row_ptr,
    rows_ptr,
    row_ptr,
    gate_ptr,
    tokens,
    blocks_per_rank,
    first_expert,
    capacity,
    EXPERTS: tl.constexpr,
    LOCAL: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0)
    source = block // blocks_per_rank
    map_ptr = tl.load(map_ptrs + source).to(tl.pointer_type(tl.uint8))
    probs_ptr = tl.load(probs_ptrs + source).to(tl.pointer_type(tl.float32))
    t = (block % blocks_per_rank) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    mask = (t < tokens)[:, None] & (e < LOCAL)[None, :]
    published = t[:, None] * EXPERTS + first_expert + e[None, :]
    is_routed = tl.load(map_ptr + published, mask=mask, other=0).to(tl.int32)
    rows = tl.load(rows_ptr + e, mask=e < LOCAL, other=0)
    first_row = tl.load(first_row_ptr + block * LOCAL + e, mask=e < LOCAL, other=0) + tl.cumsum(rows, axis=0) - rows
    row = first_row[None, :] + tl.cumsum(is_routed, axis=0) - is_routed
    slot = tl.cumsum(is_routed, axis=1) - is_routed
    token = source * tokens + t
    # slots of other ranks' experts have no row here
    k = tl.arange(0, BLOCK_K)
    num_local = tl.sum(is_routed, axis=1)
    unused = (t < tokens)[:, None] & (k < TOPK)[None, :] & (k[None, :] >= num_local[:, None])
    tl.store(row_ptr + token[:, None] * TOPK + k[None, :], tl.full((BLOCK_T, BLOCK_K), -1, tl.int32), mask=unused)
    slot_mask = mask & (is_routed > 0) & (slot < TOPK)
    tl.store(row_ptr + token[:, None] * TOPK + slot, tl.where(row < capacity, row, -1), mask=slot_mask)
    is_kept = slot_mask & (row < capacity)
    gate = tl.load(probs_ptr + published, mask=is_kept, other=0.0)
    tl.store(gate_ptr + row, gate, mask=is_kept)


@triton.jit
def _clamp_kernel(rows_ptr, kept_ptr, peak_ptr, capacity, LOCAL: tl.constexpr, BLOCK_E: tl.constexpr):
    e = tl.arange(0, BLOCK_E)
    rows = tl.load(rows_ptr + e, mask=e < LOCAL, other=0)
    ends = tl.cumsum(rows, axis=0)
    kept = tl.minimum(ends, capacity) - tl.minimum(ends - rows, capacity)
    tl.store(kept_ptr + e, kept, mask=e < LOCAL)
    tl.atomic_max(peak_ptr, tl.sum(rows, axis=0))


@triton.jit
def _pull_rows_kernel(
    x_ptrs,
    row_ptr,
    out_ptr,
    tokens,
    first_token,
    all_tokens,
    WIDTH: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # every rank begins with its own tokens, so that not all ranks read from the same one at once
    s = (tl.program_id(0) + first_token) % all_tokens
    source = s // tokens
    t = (s % tokens).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    rows = tl.load(row_ptr + s.to(tl.int64) * TOPK + k, mask=k < TOPK, other=-1)
    if tl.max(rows, axis=0) >= 0:
        x_ptr = tl.load(x_ptrs + source).to(tl.pointer_type(out_ptr.dtype.element_ty))
        for start in tl.static_range(0, WIDTH, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            x = tl.load(x_ptr + t * WIDTH + h, mask=h < WIDTH)
            for slot in tl.static_range(TOPK):
                row = tl.load(row_ptr + s.to(tl.int64) * TOPK + slot).to(tl.int64)
                tl.store(out_ptr + row * WIDTH + h, x, mask=(h < WIDTH) & (row >= 0))


@triton.jit
def _partial_sums_kernel(
    rows_ptr, row_ptr, out_ptr, WIDTH: tl.constexpr, TOPK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr
):
    s = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    rows = tl.load(row_ptr + s * TOPK + k, mask=k < TOPK, other=-1)
    if tl.max(rows, axis=0) >= 0:
        for start in tl.static_range(0, WIDTH, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            total = tl.zeros((BLOCK_H,), tl.float32)
            for slot in tl.static_range(TOPK):
                row = tl.load(row_ptr + s * TOPK + slot).to(tl.int64)
                total += tl.load(rows_ptr + row * WIDTH + h, mask=(h < WIDTH) & (row >= 0), other=0.0).to(tl.float32)
            tl.store(out_ptr + s * WIDTH + h, total.to(out_ptr.dtype.element_ty), mask=h < WIDTH)


@triton.jit
def _sum_over_ranks_kernel(
    partial_ptrs,
    uses_ptr,
    add_ptr,
    out_ptr,
    first_token,
    HAS_ADD: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    for start in tl.static_range(0, WIDTH, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        total = tl.zeros((BLOCK_H,), tl.float32)
        for rank in tl.static_range(RANKS):
            is_used = tl.load(uses_ptr + t * RANKS + rank) > 0
            partial_ptr = tl.load(partial_ptrs + rank).to(tl.pointer_type(out_ptr.dtype.element_ty))
            offset = (first_token + t) * WIDTH + h
            total += tl.load(partial_ptr + offset, mask=(h < WIDTH) & is_used, other=0.0).to(tl.float32)
        if HAS_ADD:
            total += tl.load(add_ptr + t * WIDTH + h, mask=h < WIDTH, other=0.0).to(tl.float32)
        tl.store(out_ptr + t * WIDTH + h, total.to(out_ptr.dtype.element_ty), mask=h < WIDTH)


@triton.jit
def _slot_gradients_kernel(dgate_ptr, row_ptr, out_ptr, slots, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + offset, mask=offset < slots, other=-1)
    gradient = tl.load(dgate_ptr + row, mask=row >= 0, other=0.0)
    tl.store(out_ptr + offset, gradient.to(tl.float32), mask=offset < slots)


@triton.jit
def _pull_gate_gradients_kernel(
    slot_ptrs,
    map_ptr,
    out_ptr,
    tokens,
    first_token,
    EXPERTS: tl.constexpr,
    LOCAL: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    rank = tl.program_id(1)
    slot_ptr = tl.load(slot_ptrs + rank).to(tl.pointer_type(tl.float32))
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    mask = (t < tokens)[:, None] & (e < LOCAL)[None, :]
    own = t[:, None] * EXPERTS + rank * LOCAL + e[None, :]
    is_routed = tl.load(map_ptr + own, mask=mask, other=0).to(tl.int32)
    slot = tl.cumsum(is_routed, axis=1) - is_routed
    slot_mask = mask & (is_routed > 0) & (slot < TOPK)
    gradient = tl.load(slot_ptr + (first_token + t)[:, None] * TOPK + slot, mask=slot_mask, other=0.0)
    tl.store(out_ptr + own, gradient, mask=mask)


def count_rows(map_ptrs_W: Tensor, tokens: int, experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """Count the rows of this rank's experts in all ranks' routing maps.

    Shapes: addresses [W] of maps [T,E] of uint8.
    Returns: first row of each block of tokens within its expert [blocks,L], rows per expert [L]; int32.
    """
    ranks = map_ptrs_W.shape[0]
    local = experts // ranks
    blocks = triton.cdiv(tokens, _BLOCK_T)
    counts_BL = torch.empty(ranks * blocks, local, dtype=torch.int32, device=map_ptrs_W.device)
    _count_kernel[(ranks * blocks,)](
        map_ptrs_W,
        counts_BL,
        tokens,
        blocks,
        rank * local,
        EXPERTS=experts,
        LOCAL=local,
        BLOCK_T=_BLOCK_T,
        BLOCK_E=triton.next_power_of_2(local),
        num_warps=4,
    )
    # replaces the counts by first rows
    rows_L = rows_per_expert(counts_BL)
    return counts_BL, rows_L


def clamp_rows(rows_L: Tensor, capacity: int, peak: Tensor) -> Tensor:
    """Return the rows per expert within the capacity, and raise `peak` [1] to the number of all rows."""
    kept_L = torch.empty_like(rows_L)
    local = rows_L.shape[0]
    _clamp_kernel[(1,)](rows_L, kept_L, peak, capacity, LOCAL=local, BLOCK_E=triton.next_power_of_2(local))
    return kept_L


def index_rows(
    map_ptrs_W: Tensor,
    probs_ptrs_W: Tensor,
    first_row_BL: Tensor,
    rows_L: Tensor,
    tokens: int,
    experts: int,
    topk: int,
    rank: int,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """Compute the row of each slot of all ranks' tokens, and pull the gates of the rows.

    Returns: row [S,K] (int32; -1: another rank's expert, or beyond the capacity), gate [C] (fp32; undefined where there
        is no row).
    """
    ranks = map_ptrs_W.shape[0]
    local = experts // ranks
    blocks = triton.cdiv(tokens, _BLOCK_T)
    row_SK = torch.empty(ranks * tokens, topk, dtype=torch.int32, device=rows_L.device)
    gate_C = torch.empty(capacity, dtype=torch.float32, device=rows_L.device)
    _row_index_kernel[(ranks * blocks,)](
        map_ptrs_W,
        probs_ptrs_W,
        first_row_BL,
        rows_L,
        row_SK,
        gate_C,
        tokens,
        blocks,
        rank * local,
        capacity,
        EXPERTS=experts,
        LOCAL=local,
        TOPK=topk,
        BLOCK_T=_BLOCK_T,
        BLOCK_E=triton.next_power_of_2(local),
        BLOCK_K=triton.next_power_of_2(topk),
        num_warps=8,
    )
    return row_SK, gate_C


def pull_rows(x_ptrs_W: Tensor, row_SK: Tensor, out_CH: Tensor, rank: int) -> Tensor:
    """Pull every token that has a row here from its rank into its rows. Returns: `out`."""
    all_tokens, topk = row_SK.shape
    tokens, width = all_tokens // x_ptrs_W.shape[0], out_CH.shape[1]
    _pull_rows_kernel[(all_tokens,)](
        x_ptrs_W, row_SK, out_CH, tokens, rank * tokens, all_tokens, TOPK=topk, **_row_options(width, topk)
    )
    return out_CH


def write_partial_sums(rows_CH: Tensor, row_SK: Tensor, out_SH: Tensor) -> None:
    """Sum the local rows of every token of all ranks in fp32; tokens without a row are not written."""
    all_tokens, topk = row_SK.shape
    _partial_sums_kernel[(all_tokens,)](rows_CH, row_SK, out_SH, TOPK=topk, **_row_options(rows_CH.shape[1], topk))


def sum_over_ranks(partial_ptrs_W: Tensor, uses_TW: Tensor, add_TH: Tensor | None, out_TH: Tensor, rank: int) -> Tensor:
    """Pull and add the partial sums of this rank's tokens from the ranks that they use. Returns: `out`."""
    tokens, width = out_TH.shape
    options = _row_options(width, 1)
    del options["BLOCK_K"]
    _sum_over_ranks_kernel[(tokens,)](
        partial_ptrs_W,
        uses_TW,
        add_TH,
        out_TH,
        rank * tokens,
        HAS_ADD=add_TH is not None,
        RANKS=partial_ptrs_W.shape[0],
        **options,
    )
    return out_TH


def write_gate_gradients(dgate_C: Tensor, row_SK: Tensor, out_SK: Tensor) -> None:
    """Write the gradient of every slot's gate, 0 where the slot has no row here."""
    slots = row_SK.numel()
    _slot_gradients_kernel[(triton.cdiv(slots, 1024),)](dgate_C, row_SK, out_SK, slots, BLOCK=1024)


def pull_gate_gradients(slot_ptrs_W: Tensor, map_TE: Tensor, topk: int, rank: int) -> Tensor:
    """Pull the gradients of this rank's gates from the ranks of their experts. Returns: [T,E] fp32."""
    (tokens, experts), ranks = map_TE.shape, slot_ptrs_W.shape[0]
    local = experts // ranks
    out_TE = torch.empty(tokens, experts, dtype=torch.float32, device=map_TE.device)
    _pull_gate_gradients_kernel[(triton.cdiv(tokens, _BLOCK_T), ranks)](
        slot_ptrs_W,
        map_TE,
        out_TE,
        tokens,
        rank * tokens,
        EXPERTS=experts,
        LOCAL=local,
        TOPK=topk,
        BLOCK_T=_BLOCK_T,
        BLOCK_E=triton.next_power_of_2(local),
        num_warps=4,
    )
    return out_TE


def _row_options(width: int, topk: int) -> dict[str, int]:
    return {
        "WIDTH": width,
        "BLOCK_H": min(_BLOCK_H, triton.next_power_of_2(width)),
        "BLOCK_K": triton.next_power_of_2(topk),
        "num_warps": 8,
    }
