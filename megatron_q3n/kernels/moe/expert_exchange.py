"""Expert-parallel exchange of tokens and expert outputs, without host synchronization where peers share memory.

`CollectiveExchange` is the reference: all-gather of tokens, routing maps and gates, and reduce-scatter of the weighted
partial sums. It runs on every backend (NCCL, gloo) and reads the number of rows on the host. `SymmetricExchange` pulls
rows through symmetric memory with the kernels of `expert_exchange_triton.py`: each token crosses to a rank at most
once, and counts, offsets and rows stay on the device. Both have the same row order, so they give the same sums up to
rounding.

The number of rows that a rank gets depends on the routing. `SymmetricExchange` reads it on the host and is exact,
unless a capacity is set (`static_capacity`), as while a CUDA graph is captured: then shapes are static, and rows beyond
the capacity are missing. `peak_rows` counts all rows, so that the caller finds an overflow and repeats the passes
exactly (training/step_graph.py).

All ranks of the group must call with equally many tokens.
Shapes: W ranks, T tokens of a rank, S = W·T, E experts, L = E/W local ones, K experts per token, C rows, H width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_q3n.kernels.norms import accumulation_dtype

# rows of a block of the grouped GEMM
_CAPACITY_MULTIPLE = 128
_ALIGNMENT_BYTES = 256


@dataclass(frozen=True)
class Dispatched:
    """Rows on this rank: `rows` [C,H] sorted by local expert, `gates` [C], `counts` [L] int32 rows per local expert.

    Rows beyond the sum of the counts are undefined. `origin` is what the exchange needs to combine them.
    """

    rows: Tensor
    gates: Tensor
    counts: Tensor
    origin: Any


class ExpertExchange(Protocol):
    """Exchange of one model, shared by its MoE layers; see the module's docstring for its two kinds."""

    def dispatch(self, x_TH: Tensor, map_TE: Tensor, probs_TE: Tensor) -> Dispatched:
        """Bring every token to the ranks of its experts.

        Shapes: tokens [T,H], routing map [T,E] bool with K experts per token, gates [T,E], differentiable.
        """

    def combine(self, rows_CH: Tensor, dispatched: Dispatched, add_TH: Tensor | None = None) -> Tensor:
        """Sum each token's rows over the ranks of its experts, and `add` where it is not None. Returns: [T,H]."""


class CollectiveExchange:
    """Exchange by all-gather and reduce-scatter."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def dispatch(self, x_TH: Tensor, map_TE: Tensor, probs_TE: Tensor) -> Dispatched:
        """See ExpertExchange."""
        num_local, rank = map_TE.shape[1] // self._group.size(), self._group.rank()
        local = slice(rank * num_local, (rank + 1) * num_local)
        map_SL = _all_gather(map_TE.to(torch.uint8), self._group)[:, local].bool()
        expert_C, token_C = map_SL.T.nonzero(as_tuple=True)
        gates_C = _AllGather.apply(probs_TE, self._group)[:, local][token_C, expert_C]
        rows_CH = _AllGather.apply(x_TH, self._group).index_select(0, token_C)
        return Dispatched(rows_CH, gates_C, map_SL.sum(0, dtype=torch.int32), (token_C, map_SL.shape[0]))

    def combine(self, rows_CH: Tensor, dispatched: Dispatched, add_TH: Tensor | None = None) -> Tensor:
        """See ExpertExchange."""
        token_C, all_tokens = dispatched.origin
        rows = rows_CH.to(accumulation_dtype(rows_CH))
        partial_SH = rows.new_zeros(all_tokens, rows.shape[1]).index_add(0, token_C, rows)
        total_TH = _ReduceScatter.apply(partial_SH, self._group)
        return (total_TH if add_TH is None else total_TH + add_TH).to(rows_CH.dtype)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed = _reduce_scatter(gradient.to(accumulation_dtype(gradient)), ctx.group)
        return summed.to(gradient.dtype), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_gather(gradient, ctx.group), None


def _all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    torch.distributed.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    torch.distributed.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


@dataclass(frozen=True)
class ExchangeShape:
    """Sizes of a SymmetricExchange: the most tokens of a rank, and the model's dimensions."""

    tokens: int
    hidden: int
    experts: int
    topk: int

    def num_bytes(self, ranks: int) -> dict[str, int]:
        """Return the bytes of each published buffer of a rank: tokens, partial sums, map, gates, gates' gradients."""
        return {
            "x": self.tokens * self.hidden * 2,
            "partial": ranks * self.tokens * self.hidden * 2,
            "map": self.tokens * self.experts,
            "probs": self.tokens * self.experts * 4,
            "slots": ranks * self.tokens * self.topk * 4,
        }


class PublishedBuffers:
    """Buffers of one rank that its peers read: local tensors, and tables of all ranks' addresses, int64 [W]."""

    def __init__(self, shape: ExchangeShape, memory: Tensor, addresses: list[int], rank: int) -> None:
        """Lay the buffers out in `memory`, uint8 of `total_bytes`; `addresses` of the same memory on each rank."""
        self.shape, self.rank, self.num_ranks = shape, rank, len(addresses)
        bases_W = torch.tensor(addresses, dtype=torch.int64, device=memory.device)
        self.local: dict[str, Tensor] = {}
        self.pointers: dict[str, Tensor] = {}
        dtypes = {"x": torch.bfloat16, "partial": torch.bfloat16, "map": torch.uint8}
        start = 0
        for name, size in shape.num_bytes(self.num_ranks).items():
            self.local[name] = memory[start : start + size].view(dtypes.get(name, torch.float32))
            self.pointers[name] = bases_W + start
            start += _aligned(size)

    @staticmethod
    def total_bytes(shape: ExchangeShape, ranks: int) -> int:
        """Return the bytes of the memory of one rank."""
        return sum(map(_aligned, shape.num_bytes(ranks).values()))

    def publish(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor to the start of a buffer; it may be smaller than the buffer."""
        self.local[name][: tensor.numel()].view(tensor.shape).copy_(tensor)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


class SymmetricExchange:
    """Exchange through symmetric memory, in bf16; its buffers are shared by all layers of a model."""

    def __init__(self, group: ProcessGroup, shape: ExchangeShape, device: torch.device) -> None:
        """Describe the exchange; its memory is allocated by the first dispatch (`_allocated`)."""
        self._group, self._shape, self._device = group, shape, device
        self.capacity: int | None = None
        self.peak_rows = torch.zeros(1, dtype=torch.int32, device=device)
        # whether a peer may still read tokens that this rank published
        self._may_be_read = False

    @contextmanager
    def static_capacity(self, rows: int) -> Iterator[int]:
        """Give every dispatch inside the context a fixed number of rows, and leave out what does not fit.

        Yields: `rows`, rounded up, and at most what any routing needs.
        """
        shape = self._shape
        num_local = shape.experts // self._group.size()
        limit = self._group.size() * shape.tokens * min(shape.topk, num_local)
        self.capacity = min(-(-max(rows, 1) // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE, limit)
        # a replayed graph follows passes of which nothing is known here
        self._may_be_read = True
        try:
            yield self.capacity
        finally:
            self.capacity = None

    @cached_property
    def _allocated(self) -> tuple[Any, PublishedBuffers]:
        """Allocate the buffers and exchange their addresses: a handle with the barrier, and the buffers.

        A collective call, in the first pass that exchanges tokens: a model that only generates needs no buffers.
        """
        from torch.distributed import _symmetric_memory as symmetric_memory  # late: only with GPUs

        size = PublishedBuffers.total_bytes(self._shape, self._group.size())
        memory = symmetric_memory.empty(size, dtype=torch.uint8, device=self._device)
        handle = symmetric_memory.rendezvous(memory, self._group)
        own = handle.buffer_ptrs[handle.rank]
        # the memory may begin inside of the block that is shared; at the same place on every rank
        addresses = [base + memory.data_ptr() - own for base in handle.buffer_ptrs]
        return handle, PublishedBuffers(self._shape, memory, addresses, handle.rank)

    @property
    def buffers(self) -> PublishedBuffers:
        """The buffers that peers read."""
        return self._allocated[1]

    def dispatch(self, x_TH: Tensor, map_TE: Tensor, probs_TE: Tensor) -> Dispatched:
        """See ExpertExchange."""
        rows, gates, counts, row_SK, uses_TW = _Dispatch.apply(x_TH, map_TE, probs_TE, self)
        return Dispatched(rows, gates, counts, (row_SK, uses_TW))

    def combine(self, rows_CH: Tensor, dispatched: Dispatched, add_TH: Tensor | None = None) -> Tensor:
        """See ExpertExchange."""
        return _Combine.apply(rows_CH, add_TH, *dispatched.origin, self)

    def publish_tokens(self, x_TH: Tensor) -> None:
        """Copy the tokens to where the peers read them, as soon as these have read the previous ones."""
        if self._may_be_read:
            self.barrier()
        self.buffers.publish("x", x_TH)
        self._may_be_read = True

    def barrier(self) -> None:
        """Wait on the device until every rank has written what it publishes, and read what was published before."""
        self._allocated[0].barrier(channel=0)

    def end_of_reads(self) -> None:
        """Note that a barrier has followed the reads of the published tokens."""
        self._may_be_read = False


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, map_TE: Tensor, probs_TE: Tensor, exchange: SymmetricExchange
    ) -> tuple[Tensor, ...]:
        buffers = exchange.buffers
        exchange.publish_tokens(x_TH)
        buffers.publish("map", map_TE)
        buffers.publish("probs", probs_TE)
        exchange.barrier()
        rows, gates, counts, row_SK = rows_of_published(buffers, x_TH.shape[0], exchange.capacity, exchange.peak_rows)
        uses_TW = map_TE.unflatten(1, (buffers.num_ranks, -1)).any(-1)
        ctx.save_for_backward(row_SK, map_TE, uses_TW)
        ctx.exchange = exchange
        ctx.mark_non_differentiable(counts, row_SK, uses_TW)
        return rows, gates, counts, row_SK, uses_TW

    @staticmethod
    def backward(ctx: Any, drows: Tensor, dgates: Tensor, *_: Any) -> tuple[Tensor, None, Tensor, None]:
        from megatron_q3n.kernels.moe import expert_exchange_triton as kernels  # late: Triton

        row_SK, map_TE, uses_TW = ctx.saved_tensors
        exchange = ctx.exchange
        buffers = exchange.buffers
        kernels.write_partial_sums(drows.contiguous(), row_SK, buffers.local["partial"])
        kernels.write_gate_gradients(dgates.contiguous(), row_SK, buffers.local["slots"])
        exchange.barrier()
        exchange.end_of_reads()
        dx_TH = drows.new_empty(map_TE.shape[0], drows.shape[1])
        kernels.sum_over_ranks(buffers.pointers["partial"], uses_TW, None, dx_TH, buffers.rank)
        dprobs = kernels.pull_gate_gradients(buffers.pointers["slots"], map_TE, row_SK.shape[1], buffers.rank)
        return dx_TH, None, dprobs, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_CH: Tensor, add_TH: Tensor | None, row_SK: Tensor, uses_TW: Tensor, exchange: SymmetricExchange
    ) -> Tensor:
        from megatron_q3n.kernels.moe import expert_exchange_triton as kernels  # late: Triton

        buffers = exchange.buffers
        ctx.save_for_backward(row_SK)
        ctx.exchange, ctx.num_rows = exchange, rows_CH.shape[0]
        kernels.write_partial_sums(rows_CH.contiguous(), row_SK, buffers.local["partial"])
        exchange.barrier()
        exchange.end_of_reads()
        out_TH = rows_CH.new_empty(uses_TW.shape[0], rows_CH.shape[1])
        add_TH = None if add_TH is None else add_TH.contiguous()
        return kernels.sum_over_ranks(buffers.pointers["partial"], uses_TW, add_TH, out_TH, buffers.rank)

    @staticmethod
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        from megatron_q3n.kernels.moe import expert_exchange_triton as kernels  # late: Triton

        (row_SK,) = ctx.saved_tensors
        exchange = ctx.exchange
        exchange.publish_tokens(dout_TH)
        exchange.barrier()
        drows = dout_TH.new_empty(ctx.num_rows, dout_TH.shape[1])
        kernels.pull_rows(exchange.buffers.pointers["x"], row_SK, drows, exchange.buffers.rank)
        return drows, dout_TH if ctx.needs_input_grad[1] else None, None, None, None


def rows_of_published(
    buffers: PublishedBuffers, tokens: int, capacity: int | None, peak_rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pull the rows of this rank's experts, after all ranks have published; without a capacity, the host waits.

    Returns: rows [C,H], gates [C], rows per expert [L], row of each slot of all ranks' tokens [S,K].
    """
    from megatron_q3n.kernels.moe import expert_exchange_triton as kernels  # late: Triton

    shape, pointers, rank = buffers.shape, buffers.pointers, buffers.rank
    first_row_BL, rows_L = kernels.count_rows(pointers["map"], tokens, shape.experts, rank)
    if capacity is None:
        capacity = max(int(rows_L.sum().item()), 1)
    counts_L = kernels.clamp_rows(rows_L, capacity, peak_rows)
    row_SK, gates_C = kernels.index_rows(
        pointers["map"], pointers["probs"], first_row_BL, rows_L, tokens, shape.experts, shape.topk, rank, capacity
    )
    rows_CH = torch.empty(capacity, shape.hidden, dtype=torch.bfloat16, device=rows_L.device)
    kernels.pull_rows(pointers["x"], row_SK, rows_CH, rank)
    return rows_CH, gates_C, counts_L, row_SK
