"""Context parallelism: distribution of a sequence's tokens over ranks, and the exchange of states between ranks.

The zigzag order is that of megatron-core and TransformerEngine: every document is split into 2n equal chunks for n
ranks, and rank r holds chunks r and 2n-1-r, so that causal attention costs every rank the same. Without packing a row
is one document. Lengths must be multiples of 2n (`data.document_alignment`).

Shapes: B rows, T tokens of a whole row, S = T/n tokens of a rank, n ranks, C channels, Hv value heads, K/V head dims.
"""

from functools import cache

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.gated_delta_net.common import tensor_a2a_cp2hp, tensor_a2a_hp2cp
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.multi_token_prediction import roll_tensor
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_q3n.kernels.gated_delta.backend import Rule
from megatron_q3n.kernels.gated_delta.causal_conv import next_conv_state
from megatron_q3n.packing import Packing


def zigzag_indices(packing: Packing | None, tokens: int, size: int, device: torch.device) -> Tensor:
    """Return which tokens of a row each rank holds, in its own order (`Packing.zigzag`); a plain row is one document.

    Those of plain rows are made once: a copy to the device cannot be captured in a CUDA graph.
    Shapes: int64 [n, S].
    """
    if packing is None:
        return _plain_indices(tokens, size, device)
    return packing.zigzag(size).to(device)


# kept: a captured CUDA graph reads it
@cache
def _plain_indices(tokens: int, size: int, device: torch.device) -> Tensor:
    return Packing.of((0, tokens)).zigzag(size).to(device)


def slice_for_rank(tensors: dict[str, Tensor], packing: Packing | None, group: ProcessGroup) -> dict[str, Tensor]:
    """Return this rank's tokens [B,S] of [B,T] tensors."""
    if group.size() == 1:
        return tensors
    first = next(iter(tensors.values()))
    indices_S = zigzag_indices(packing, first.shape[1], group.size(), first.device)[group.rank()]
    return {name: x.index_select(1, indices_S) for name, x in tensors.items()}


def shift_left(x: Tensor, dim: int, packed_seq_params: PackedSeqParams | None, group: ProcessGroup) -> Tensor:
    """Replace every token by the next one of its document; the last token becomes 0.

    megatron-core's `roll_tensor` serves packed rows. Between context-parallel ranks its plain form copies from the
    host, which cannot be captured in a CUDA graph; here the ranks all-gather the first tokens of their chunks.
    Shapes: x with S tokens in `dim`, without a gradient.
    """
    if packed_seq_params is not None or group.size() == 1:
        return roll_tensor(x, -1, dim, group, packed_seq_params)[0]
    rank, last = group.rank(), group.size() - 1
    chunks = x.chunk(2, dim)
    firsts = torch.stack([chunk.select(dim, 0) for chunk in chunks])
    flat = firsts.new_empty(2 * group.size(), *firsts.shape[1:])
    torch.distributed.all_gather_into_tensor(flat, firsts, group=group)
    gathered = flat.unflatten(0, (group.size(), 2))
    # chunk r is followed by chunk r+1, the first of rank r+1 or the second of the last rank; the last chunk by nothing
    after_first = gathered[rank + 1, 0] if rank < last else gathered[last, 1]
    after_second = gathered[rank - 1, 1] if rank > 0 else torch.zeros_like(firsts[1])
    parts = []
    for chunk, after in zip(chunks, (after_first, after_second)):
        parts += [chunk.narrow(dim, 1, chunk.shape[dim] - 1), after.unsqueeze(dim)]
    return torch.cat(parts, dim)


def heads_for_sequence(x_SBH: Tensor, packing: Packing | None, group: ProcessGroup) -> Tensor:
    """All-to-all from [S,B,H], part of the sequence and all heads, to [T,B,H/n] in the row's order."""
    gathered = tensor_a2a_cp2hp(x_SBH, 0, -1, group, undo_attention_load_balancing=False)
    order = zigzag_indices(packing, gathered.shape[0], group.size(), x_SBH.device).flatten()
    return gathered.index_select(0, order.argsort())


def sequence_for_heads(x_TBH: Tensor, packing: Packing | None, group: ProcessGroup) -> Tensor:
    """Invert `heads_for_sequence`: [T,B,H/n] to [S,B,H]."""
    order = zigzag_indices(packing, x_TBH.shape[0], group.size(), x_TBH.device).flatten()
    zigzag = x_TBH.index_select(0, order).contiguous()
    return tensor_a2a_hp2cp(zigzag, 0, -1, group, redo_attention_load_balancing=False)


def chunks_of_rank(packing: Packing | None, rows: int, local_tokens: int, size: int, device: torch.device) -> Packing:
    """Return this rank's chunks in its own rows laid end to end, two per document; a plain row is one document."""
    if packing is not None:
        return packing.chunks_of_rank(size)
    return _plain_chunks(rows, local_tokens, device)


# kept: a captured CUDA graph reads it
@cache
def _plain_chunks(rows: int, local_tokens: int, device: torch.device) -> Packing:
    return Packing.of(range(0, rows * local_tokens + 1, local_tokens // 2), device)


def inputs_before_chunks(qkv_1SC: Tensor, conv_kernel_size: int, chunks: Packing, group: ProcessGroup) -> Tensor:
    """Return the causal convolution's halo: the last inputs before each of this rank's chunks.

    Shapes: qkv [1,S,C] of chunks within `chunks`; returns [2 · documents, C, conv kernel size - 1], oldest first,
        zeros at the start of a document.
    """
    num_inputs = conv_kernel_size - 1
    tails = next_conv_state(qkv_1SC, conv_kernel_size, packing=chunks)
    # all chunks of a document have the same length
    lengths = chunks.lengths[::2]
    before = torch.zeros_like(tails[::2])
    halos = []
    for tail in _gathered_chunks(tails, group):
        halos.append(before)
        before = torch.stack(
            [
                torch.cat([old[:, min(length, num_inputs) :], new[:, -min(length, num_inputs) :]], -1)
                for old, new, length in zip(before, tail, lengths)
            ]
        )
    return _chunks_of_rank(halos, group)


def states_before_chunks(rule: Rule, inputs: list[Tensor], group: ProcessGroup) -> Tensor:
    """Return the delta state before each of this rank's chunks, without running the whole sequence.

    A chunk maps the state S before it to M S + N, where M and N depend on this chunk only: N is its final state from
    zero, M its final state from the identity with zero values. The ranks all-gather (M, N) and scan over the few chunks
    of each document.

    Shapes: `rule` over this rank's chunks, inputs query, key, value, decay, beta [1,S,…]; returns
        [2 · documents, Hv, K, V] fp32.
    """
    query, key, value, decay, beta = inputs
    _, addition_DHKV = rule(query, key, value, decay, beta)
    assert addition_DHKV is not None
    width = key.shape[-1]
    identity = torch.eye(width, dtype=torch.float32, device=key.device)
    identity = identity.expand(addition_DHKV.shape[0], value.shape[2], width, width).contiguous()
    zero_values = value.new_zeros(*value.shape[:3], width)
    _, transition_DHKK = rule(query, key, zero_values, decay, beta, initial_state_DHKV=identity)
    assert transition_DHKK is not None
    transitions = _gathered_chunks(transition_DHKK.float(), group)
    additions = _gathered_chunks(addition_DHKV.float(), group)
    state = torch.zeros_like(addition_DHKV[::2])
    states = []
    for transition, addition in zip(transitions, additions):
        states.append(state)
        state = transition @ state + addition
    return _chunks_of_rank(states, group)


def _gathered_chunks(local: Tensor, group: ProcessGroup) -> list[Tensor]:
    """All-gather this rank's [2 · documents, …], two chunks per document, to all 2n chunks in the document's order.

    Returns: 2n tensors [documents, …].
    """
    size = group.size()
    all_ranks = gather_from_sequence_parallel_region(local.contiguous(), group=group)
    halves = [x.unflatten(0, (-1, 2)) for x in all_ranks.chunk(size)]
    first = [halves[rank][:, 0] for rank in range(size)]
    return first + [halves[rank][:, 1] for rank in reversed(range(size))]


def _chunks_of_rank(chunks: list[Tensor], group: ProcessGroup) -> Tensor:
    """Select this rank's [2 · documents, …] from all 2n chunks in order."""
    rank, last = group.rank(), len(chunks) - 1
    return torch.stack([chunks[rank], chunks[last - rank]], dim=1).flatten(0, 1)
