"""Gated delta rule in plain torch: the recurrent definition and the chunked form.

Per value head, with a state S of shape [K, V] that maps keys to values:

    S_t = exp(g_t) · S_{t-1} + k_t ⊗ β_t (v_t - k_tᵀ · exp(g_t) · S_{t-1})        o_t = scale · q_tᵀ S_t

The state decays by exp(g_t) ≤ 1; then the value recalled by the key k_t is replaced by a fraction β_t of the new value
(Gated Delta Networks, arXiv 2412.06464, eq. 10; the chunked form is its section 3.3 and DeltaNet, arXiv 2406.06484).

Token by token that is a long chain of small operations. In a chunk of C tokens the chain is linear in the state at the
chunk's start, so it becomes matrix products and one triangular solve:

    A = tril(β_i (k_i·k_j) exp(G_i - G_j), -1)      G = running sum of g in the chunk
    [u | w] = (I + A)⁻¹ [β v | β exp(G) k]           values written; keys under which the old state is erased
    v' = u - w S                                     S ← exp(G_C) S + Σ_i exp(G_C - G_i) k_i ⊗ v'_i
    o  = exp(G) q S + tril(q kᵀ exp(G_i - G_j)) v'

Only the last two lines iterate over chunks. Grouped heads are not repeated in memory: q kᵀ and k kᵀ are computed once
per key head and shared by its value heads. Packed documents (`packing`) are padded so that each starts at a chunk
boundary, where the state is reset.

Shapes: B batch, T tokens, Hk key heads, Hv = R·Hk value heads, K/V head dims, N chunks, C chunk, D documents.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels.norms import accumulation_dtype
from megatron_q3n.packing import Packing


def chunk_gated_delta_rule(
    query_BTHK: Tensor,
    key_BTHK: Tensor,
    value_BTHV: Tensor,
    decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    initial_state_DHKV: Tensor | None = None,
    packing: Packing | None = None,
    chunk_size: int = 64,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Apply the rule in chunks, in fp32 (fp64 for double inputs), on any device.

    Shapes: query, key [B,T,Hk,K] (L2-normalized by the caller); value [B,T,Hv,V]; decay (log space, ≤ 0) and
        beta [B,T,Hv]; the initial state has D rows: B without `packing`, else one per document.
    Returns: output [B,T,Hv,V] in value's dtype, and the final states [D,Hv,K,V] (None without `output_final_state`).
    Raises: ValueError if `packing` does not cover a batch of one row.
    """
    if packing is not None:
        output_BTHV, final = _packed(
            query_BTHK,
            key_BTHK,
            value_BTHV,
            decay_BTH,
            beta_BTH,
            initial_state_DHKV,
            packing,
            chunk_size,
            output_final_state,
        )
        return output_BTHV, final
    tokens = query_BTHK.shape[1]
    chunk = min(chunk_size, max(1, tokens))
    pad = -tokens % chunk
    inputs = [_pad_tokens(x, pad) for x in (query_BTHK, key_BTHK, value_BTHV, decay_BTH, beta_BTH)]
    output_BTHV, states = _chunked(*inputs, chunk=chunk, initial_state=initial_state_DHKV, starts=None)
    final = states[-1] if output_final_state else None
    return output_BTHV[:, :tokens].to(value_BTHV.dtype), final


def recurrent_gated_delta_rule(
    query_BTHK: Tensor,
    key_BTHK: Tensor,
    value_BTHV: Tensor,
    decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    initial_state_DHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply the rule token by token: the definition, and the recurrence of decoding.

    Shapes and returns: as `chunk_gated_delta_rule`, without packing.
    """
    dtype = accumulation_dtype(value_BTHV)
    repeat = value_BTHV.shape[2] // key_BTHK.shape[2]
    q, k = (x.to(dtype).repeat_interleave(repeat, dim=2) for x in (query_BTHK, key_BTHK))
    q = q * key_BTHK.shape[-1] ** -0.5
    v, g, beta = value_BTHV.to(dtype), decay_BTH.to(dtype), beta_BTH.to(dtype)
    state = _zero_state(k, v) if initial_state_DHKV is None else initial_state_DHKV.to(dtype)
    outputs = []
    for t in range(v.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        recalled = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        correction = (v[:, t] - recalled) * beta[:, t, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], correction)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1).to(value_BTHV.dtype), state


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    packing: Packing,
    chunk: int,
    with_states: bool,
) -> tuple[Tensor, Tensor | None]:
    """Pad each document to start at a chunk boundary, run once, and gather the tokens back."""
    tokens = query.shape[1]
    if query.shape[0] != 1 or packing.num_tokens != tokens:
        raise ValueError(
            f"packed documents must cover a batch of one row: found batch {query.shape[0]}, {tokens} tokens, documents "
            f"of {packing.num_tokens} tokens"
        )
    lengths = list(packing.lengths)
    inputs = [query, key, value, decay, beta]
    if initial_state is None and not with_states:
        return _by_length(inputs, lengths, chunk).to(value.dtype), None
    # many short documents need not be padded to a whole chunk
    chunk = min(chunk, max(1, *lengths))
    chunks = [-(-length // chunk) for length in lengths]
    output, states = _run_documents(inputs, lengths, chunk, initial_state)
    empty = _zero_state(key, value)[:1] if initial_state is None else None
    finals = [
        states[first + n - 1] if n else (empty if empty is not None else initial_state[i : i + 1])  # type: ignore[index]
        for i, (first, n) in enumerate(zip(_starts(chunks), chunks))
    ]
    return output.to(value.dtype), torch.cat(finals) if with_states else None


def _by_length(inputs: list[Tensor], lengths: list[int], chunk: int) -> Tensor:
    """Run documents in groups of similar length, so that none is padded to more than twice its length."""
    groups: dict[int, list[int]] = {}
    for document, length in enumerate(lengths):
        size = chunk + 1 if length > chunk else min(chunk, 1 << max(length - 1, 0).bit_length())
        groups.setdefault(size if length else 0, []).append(document)
    groups.pop(0, None)
    firsts, indices, outputs = _starts(lengths), [], []
    for size, documents in groups.items():
        indices.append(torch.cat([firsts[d] + torch.arange(lengths[d]) for d in documents]))
        group_inputs = [x.index_select(1, indices[-1].to(x.device)) for x in inputs]
        run = _run_short if size <= chunk else _run_long
        outputs.append(run(group_inputs, [lengths[d] for d in documents], min(size, chunk)))
    restore_T = torch.cat(indices).argsort().to(inputs[0].device)
    return torch.cat(outputs, 1).index_select(1, restore_T)


def _run_short(inputs: list[Tensor], lengths: list[int], chunk: int) -> Tensor:
    padded, index_T = _pad_to_chunks(inputs, lengths, chunk)
    return _within_chunks(*padded, chunk=chunk).index_select(1, index_T)


def _run_long(inputs: list[Tensor], lengths: list[int], chunk: int) -> Tensor:
    return _run_documents(inputs, lengths, chunk, None)[0]


def _run_documents(
    inputs: list[Tensor], lengths: list[int], chunk: int, initial_state: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs, and the state after every chunk."""
    padded, index_T = _pad_to_chunks(inputs, lengths, chunk)
    chunks = [-(-length // chunk) for length in lengths]
    starts = {first: i for i, (first, n) in enumerate(zip(_starts(chunks), chunks)) if n}
    output, states = _chunked(*padded, chunk=chunk, initial_state=initial_state, starts=starts)
    return output.index_select(1, index_T), states


def _pad_to_chunks(inputs: list[Tensor], lengths: list[int], chunk: int) -> tuple[list[Tensor], Tensor]:
    """Pad with zeros so that each document starts at a chunk boundary. Returns: padded inputs, index of each token."""
    chunks = [-(-length // chunk) for length in lengths]
    firsts = [first * chunk for first in _starts(chunks)]
    index_T = torch.cat([first + torch.arange(n) for first, n in zip(firsts, lengths)])
    index_T, capacity = index_T.to(inputs[0].device), sum(chunks) * chunk
    padded = [x.new_zeros(1, capacity, *x.shape[2:]).index_copy(1, index_T, x) for x in inputs]
    return padded, index_T


def _starts(sizes: list[int]) -> list[int]:
    """Return the start of each segment in a concatenation (exclusive prefix sum)."""
    return [0, *itertools.accumulate(sizes)][: len(sizes)]


def _within_chunks(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, *, chunk: int) -> Tensor:
    """Run chunks without an initial or a final state: short documents, of which a row may contain hundreds.

    All terms that contain the state, most of the work at a few tokens per document, are omitted.
    """
    dtype = accumulation_dtype(value)
    batch, _, key_heads, key_dim = key.shape
    repeat = value.shape[2] // key_heads

    def by_chunk(x: Tensor, group: int) -> Tensor:  # [B,T,H…] -> [B,N,Hk,R,C,…]
        x = x.to(dtype).reshape(batch, -1, chunk, key_heads, group, *x.shape[3:])
        return x.permute(0, 1, 3, 4, 2, *range(5, x.dim()))

    q, k, v = by_chunk(query, 1) * key_dim**-0.5, by_chunk(key, 1), by_chunk(value, repeat)
    beta_ = by_chunk(beta, repeat)[..., None]
    pair_decay = _pairwise_decay(by_chunk(decay, repeat).cumsum(-1))
    lower = ((k @ k.transpose(-1, -2)) * pair_decay * beta_).tril(-1)
    new_values = torch.linalg.solve_triangular(lower, v * beta_, upper=False, unitriangular=True)
    output = ((q @ k.transpose(-1, -2)) * pair_decay) @ new_values
    return output.permute(0, 1, 4, 2, 3, 5).reshape(value.shape)


def _pairwise_decay(total: Tensor) -> Tensor:
    """Return exp(G_i - G_j) where j ≤ i, else 0. Shapes: running sums [...,C]; returns [...,C,C]."""
    chunk = total.shape[-1]
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=total.device).triu(1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(future, float("-inf")).exp()


def _chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    *,
    chunk: int,
    initial_state: Tensor | None,
    starts: dict[int, int] | None,
) -> tuple[Tensor, list[Tensor]]:
    """Run whole chunks. `starts` maps a chunk to the document that starts there.

    Returns: the output, and the state after every chunk.
    """
    dtype = accumulation_dtype(value)
    batch, tokens, key_heads, key_dim = key.shape
    value_heads, value_dim = value.shape[2:]
    repeat, num_chunks = value_heads // key_heads, tokens // chunk

    def by_chunk(x: Tensor, heads: int, group: int) -> Tensor:  # [B,T,H…] -> [B,Hk,R,N,C,…]
        x = x.to(dtype).reshape(batch, num_chunks, chunk, heads, group, *x.shape[3:])
        return x.permute(0, 3, 4, 1, 2, *range(5, x.dim()))

    q = by_chunk(query, key_heads, 1) * key_dim**-0.5
    k = by_chunk(key, key_heads, 1)
    v = by_chunk(value, key_heads, repeat)
    beta_ = by_chunk(beta, key_heads, repeat)[..., None]
    total = by_chunk(decay, key_heads, repeat).cumsum(-1)

    pair_decay = _pairwise_decay(total)
    lower = ((k @ k.transpose(-1, -2)) * pair_decay * beta_).tril(-1)
    solved = torch.linalg.solve_triangular(
        lower, torch.cat([v * beta_, (k * beta_) * total.exp()[..., None]], -1), upper=False, unitriangular=True
    )
    u, w = solved.split([value_dim, key_dim], -1)
    local = (q @ k.transpose(-1, -2)) * pair_decay
    q_in = q * total.exp()[..., None]
    k_out = (k * (total[..., -1:] - total).exp()[..., None]).transpose(-1, -2)
    chunk_decay = total[..., -1].exp()[..., None, None]

    def initial_of(document: int | None) -> Tensor:
        if initial_state is None:
            return v.new_zeros(batch, key_heads, repeat, key_dim, value_dim)
        rows = initial_state if document is None else initial_state[document : document + 1]
        return rows.to(dtype).reshape(batch, key_heads, repeat, key_dim, value_dim)

    # each document has a single chunk: no recurrence over chunks
    if starts is not None and len(starts) == num_chunks:
        state = torch.stack([initial_of(starts[n]) for n in range(num_chunks)], 3)
        new_values = u - w @ state
        output = (q_in @ state + local @ new_values).permute(0, 3, 4, 1, 2, 5)
        after = (state * chunk_decay + k_out @ new_values).flatten(1, 2)
        return output.reshape(batch, tokens, value_heads, value_dim), list(after.unbind(2))
    state = initial_of(None) if starts is None else v.new_zeros(())
    outputs, states = [], []
    for n in range(num_chunks):
        if starts is not None and n in starts:
            state = initial_of(starts[n])
        new_values = u[:, :, :, n] - w[:, :, :, n] @ state
        outputs.append(q_in[:, :, :, n] @ state + local[:, :, :, n] @ new_values)
        state = state * chunk_decay[:, :, :, n] + k_out[:, :, :, n] @ new_values
        states.append(state.reshape(batch, value_heads, key_dim, value_dim))
    output = torch.stack(outputs, 3).permute(0, 3, 4, 1, 2, 5)
    return output.reshape(batch, tokens, value_heads, value_dim), states


def _pad_tokens(x: Tensor, pad: int) -> Tensor:
    """Append zero tokens: they neither decay the state (g = 0) nor write to it (β = 0)."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad)) if pad else x


def _zero_state(key: Tensor, value: Tensor) -> Tensor:
    return value.new_zeros(
        value.shape[0], value.shape[2], key.shape[-1], value.shape[-1], dtype=accumulation_dtype(value)
    )
