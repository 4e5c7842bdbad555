"""Context parallelism: which tokens of a sequence live on which rank, and how parts travel between ranks.

megatron-core's and TransformerEngine's order: every document is cut into 2n equal chunks for n
ranks, and rank r holds chunks r and 2n-1-r, so that causal attention costs each the same. Without
packing a row is one document. Lengths must be multiples of 2n (`data.document_alignment`).

T tokens of a whole row, S = T/n tokens of a rank, n ranks.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from megatron.core.ssm.gated_delta_net.common import tensor_a2a_cp2hp, tensor_a2a_hp2cp
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_q3n.kernels.gated_delta.causal_conv import next_conv_state


def zigzag_indices(cu_seqlens: Tensor | None, tokens: int, size: int) -> Tensor:
    """Return which tokens of the row each rank holds, in its own order.

    Shapes: cu_seqlens [documents + 1] or None; returns int64 [n, S].
    Raises: ValueError if a document's length is not a multiple of 2n.
    """
    bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    by_rank: list[list[Tensor]] = [[] for _ in range(size)]
    for start, end in pairwise(bounds):
        if (end - start) % (2 * size):
            raise ValueError(
                f"a document of {end - start} tokens cannot be cut into 2 × {size} equal chunks; "
                f"set data.document_alignment to a multiple of {2 * size}"
            )
        chunks = torch.arange(start, end).view(2 * size, -1)
        for rank in range(size):
            by_rank[rank] += [chunks[rank], chunks[2 * size - 1 - rank]]
    return torch.stack([torch.cat(parts) for parts in by_rank])


def slice_for_rank(tensors: dict[str, Tensor], cu_seqlens: Tensor | None, group: Any) -> dict[str, Tensor]:
    """Keep this rank's tokens of [B,T] tensors."""
    if group.size() == 1:
        return tensors
    tokens = next(iter(tensors.values())).shape[1]
    mine = zigzag_indices(cu_seqlens, tokens, group.size())[group.rank()]
    return {name: x.index_select(1, mine.to(x.device)) for name, x in tensors.items()}


def heads_for_sequence(x_SBH: Tensor, cu_seqlens: Tensor | None, group: Any) -> Tensor:
    """Trade heads for sequence: [S,B,H] with all heads becomes [T,B,H/n] in the row's own order."""
    gathered = tensor_a2a_cp2hp(x_SBH, 0, -1, group, undo_attention_load_balancing=False)
    order = zigzag_indices(cu_seqlens, gathered.shape[0], group.size()).flatten()
    return gathered.index_select(0, order.argsort().to(x_SBH.device))


def sequence_for_heads(x_TBH: Tensor, cu_seqlens: Tensor | None, group: Any) -> Tensor:
    """Undo `heads_for_sequence`."""
    order = zigzag_indices(cu_seqlens, x_TBH.shape[0], group.size()).flatten()
    zigzag = x_TBH.index_select(0, order.to(x_TBH.device)).contiguous()
    return tensor_a2a_hp2cp(zigzag, 0, -1, group, redo_attention_load_balancing=False)


def local_segments(cu_seqlens: Tensor | None, rows: int, local_tokens: int, size: int) -> Tensor:
    """Return the bounds of this rank's chunks in its own rows laid end to end, two per document.

    Shapes: int32 [2 · documents + 1], documents = rows without packing.
    """
    if cu_seqlens is None:
        lengths = torch.full((2 * rows,), local_tokens // 2)
    else:
        lengths = (cu_seqlens.diff() // (2 * size)).repeat_interleave(2)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


def inputs_before_chunks(qkv_1SC: Tensor, taps: int, bounds: Tensor, group: Any) -> Tensor:
    """Return the causal convolution's halo: the last taps-1 inputs before each of this rank's chunks.

    Shapes: qkv [1, S, C] of chunks within `bounds`; returns [2 · documents, C, taps-1], oldest first,
        zeros before a document.
    """
    tails = next_conv_state(qkv_1SC, taps, cu_seqlens=bounds)
    lengths = bounds.diff()[::2].tolist()  # a document's chunks are all of one length
    before = torch.zeros_like(tails[::2])
    halos = []
    for tail in _gathered_chunks(tails, group):
        halos.append(before)
        before = torch.stack(
            [
                torch.cat([old[:, min(length, taps - 1) :], new[:, -min(length, taps - 1) :]], -1)
                for old, new, length in zip(before, tail, lengths)
            ]
        )
    return _own_chunks(halos, group)


def states_before_chunks(rule: Callable[..., Any], inputs: list[Tensor], group: Any) -> Tensor:
    """Return the delta state before each of this rank's chunks, without running the whole sequence.

    A chunk turns the state S before it into M S + N, and M and N are its own affair: N is its final
    state from zero, M its final state from the identity with nothing to write. The ranks gather all
    (M, N) and walk the few chunks of each document.

    Shapes: `rule` over this rank's chunks, inputs query … beta [1, S, …]; returns
        [2 · documents, Hv, K, V] fp32.
    """
    query, key, value, decay, beta = inputs
    _, written = rule(query, key, value, decay, beta)
    width = key.shape[-1]
    identity = torch.eye(width, dtype=torch.float32, device=key.device)
    identity = identity.expand(written.shape[0], value.shape[2], width, width).contiguous()
    nothing = value.new_zeros(*value.shape[:3], width)
    _, kept = rule(query, key, nothing, decay, beta, initial_state_DHKV=identity)
    transitions = _gathered_chunks(kept.float(), group)
    additions = _gathered_chunks(written.float(), group)
    state = torch.zeros_like(written[::2])
    states = []
    for transition, addition in zip(transitions, additions):
        states.append(state)
        state = transition @ state + addition
    return _own_chunks(states, group)


def _gathered_chunks(mine: Tensor, group: Any) -> list[Tensor]:
    """From this rank's [2 · documents, …], two chunks a document, to all 2n chunks in the documents'
    order, each [documents, …]."""
    size = group.size()
    everyone = gather_from_sequence_parallel_region(mine.contiguous(), group=group)
    halves = [x.unflatten(0, (-1, 2)) for x in everyone.chunk(size)]
    first = [halves[rank][:, 0] for rank in range(size)]
    return first + [halves[rank][:, 1] for rank in reversed(range(size))]


def _own_chunks(chunks: list[Tensor], group: Any) -> Tensor:
    """From all 2n chunks in order to this rank's [2 · documents, …]."""
    rank, last = group.rank(), len(chunks) - 1
    return torch.stack([chunks[rank], chunks[last - rank]], dim=1).flatten(0, 1)
