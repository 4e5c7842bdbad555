"""The model on a few new tokens of sequences whose earlier tokens it remembers: prefill, decoding, drafts.

HybridModel.forward has no way to carry state through our Gated DeltaNet, so this walks its modules:
embedding, sublayers, final norm, output layer, each megatron-core's own with its own weights. One
function serves whole prompts, chunks of prompts, single tokens and drafts to verify, for they differ
only in how many tokens each sequence brings (`Span`).

**Drafts.** The multi-token prediction (MTP) layer reads the trunk's state at position t beside the
embedding of token t+1 and predicts token t+2. Its cache holds keys and values of exactly that, for
every t whose next token is known. Drafting further repeats the layer: its own output at t and the
drafted token t+2 go in at position t+1, seeing the depth-1 keys and values of the prefix and those
of earlier drafts, which are written over once the trunk has seen the true tokens.

**FP8** is left out: products of one token are too small for it, and bound by reading weights.

**Launches.** A few tokens cost a GPU what it takes to launch their work, and a host the Python around
it. So a few tokens take short ways with the same weights (`few_experts.py`, `few_rows.py`, `attention.py`),
and nothing in them waits for the device (`Span.at`): such a pass may be captured and replayed whole.

Shapes: as in state.py; V vocabulary, X hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from megatron_q3n.kernels import registry
from megatron_q3n.kernels.decode import gated_delta as steps
from megatron_q3n.kernels.gated_delta.mixer import DeltaHeads, DeltaWeights
from megatron_q3n.model.decode import experts as decode_experts
from megatron_q3n.model.decode.attention import Rotary, RotaryRows, attend
from megatron_q3n.model.decode.fused_linear import add_projected, join_embeddings, project_normed, raw_logits_of
from megatron_q3n.model.decode.span import Span
from megatron_q3n.model.decode.state import DecodeState, KeyValueCache, Memory, mtp_layers
from megatron_q3n.model.gated_delta_net import GatedDeltaNet, GatedDeltaNetState

# a short prompt goes through the delta rule token by token in a single launch, which leaves the state after each:
# shorter than starting the chunked kernels, which also compile anew for lengths they have not seen
_PROMPT_STEPS = 128
_PROMPT_STATE_BYTES = 256 * 2**20
_FIRST_ROTATIONS = 1024  # positions
_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """Put a model into evaluation and out of sequence parallelism, and back.

    A single token cannot be split over ranks; every rank holds all tokens instead.
    """
    parts = [part for module in model.modules() for part in (module, getattr(module, "config", 0))]
    switched = {
        (id(part), name): part for part in parts for name in _SEQUENCE_PARALLEL if getattr(part, name, False) is True
    }
    trained = model.training
    model.eval()
    for (_, name), part in switched.items():
        setattr(part, name, False)
    try:
        yield
    finally:
        for (_, name), part in switched.items():
            setattr(part, name, True)
        model.train(trained)


def extend(
    model: Any, tokens_S: Tensor, span: Span, state: DecodeState, *, each_prefix: bool = False, normed: bool = True
) -> Tensor:
    """Run new tokens through the trunk, and remember them in `state`.

    The state counts them only when `DecodeState.settle` is called: all of them, or with `each_prefix`
    (few tokens of every sequence) any number of them, for which all their states are kept till then.
    Returns: hidden [S,X] after the final norm, or before it where not `normed`: for `few_rows.read_out`.
    """
    hidden = _embed(model, tokens_S, span)
    rotary = rotary_of(model, span, state)
    room = state.begin_trial(span.counts[0]) if each_prefix else {}
    for number, layer in enumerate(model.decoder.layers):
        memory = state.layers[number]
        hidden, after = run_layer(layer, hidden, memory, span, rotary, each_prefix, room.get(number))
        if each_prefix and isinstance(after, GatedDeltaNetState):
            state.pending[number] = after
        else:
            state.layers[number] = after
    return span.flatten(model.decoder.final_norm(hidden) if normed else hidden)


def extend_mtp(
    model: Any, hidden_SX: Tensor, next_tokens_S: Tensor, span: Span, state: DecodeState, *, normed: bool = True
) -> Tensor:
    """Run the MTP layer at the span's positions, and write its keys and values.

    Shapes: hidden [S,X], the trunk's (or the layer's own, when drafting further) at these positions;
        next tokens [S], the token after each.
    Returns: hidden [S,X], whose logits are for the token after the next; before the layer's last norm where not
        `normed`.
    """
    mtp = model.mtp.layers[0]
    hidden = join_embeddings(mtp, span.arrange(hidden_SX), _embed(model, next_tokens_S, span))
    rotary = rotary_of(model, span, state)
    for number, layer in enumerate(mtp_layers(model)):
        hidden, state.mtp[number] = run_layer(layer, hidden, state.mtp[number], span, rotary, False)
    return span.flatten(mtp.final_layernorm(hidden) if normed else hidden)


def logits_of(model: Any, hidden_SX: Tensor) -> Tensor:
    """Return fp32 logits over the whole vocabulary [S,V], gathered from tensor-parallel ranks."""
    return raw_logits_of(model, hidden_SX).float()


def _embed(model: Any, tokens_S: Tensor, span: Span) -> Tensor:
    """Return embeddings as the span arranges them; RoPE is the only thing that knows positions."""
    return model.embedding(input_ids=span.arrange(tokens_S).transpose(0, 1), position_ids=None)


def rotary_of(model: Any, span: Span, state: DecodeState) -> Rotary | RotaryRows:
    """Return RoPE at the span's positions."""
    dtype, embedding = model.decoder.final_norm.weight.dtype, model.rotary_pos_emb
    if embedding.rotary_interleaved:
        return Rotary.at(span.arrange(span.position_S), embedding, dtype)
    reach = max(span.ends)
    if state.rotary_LR is None or len(state.rotary_LR) < reach:
        room = max(reach * 3 // 2, _FIRST_ROTATIONS)  # more than asked for, so that this is rare
        state.rotary_LR = RotaryRows.table(room, embedding, dtype)
    return RotaryRows(state.rotary_LR, span)


def run_layer(
    layer: Any,
    hidden: Tensor,
    memory: Memory,
    span: Span,
    rotary: Rotary | RotaryRows,
    each_prefix: bool,
    room: GatedDeltaNetState | None = None,
) -> tuple[Tensor, Memory]:
    """Run one sublayer: a mixer with its memory, or experts, which have none.

    `room` is where the states after each token may go, if all of them are kept.
    Returns: hidden, which may lie where it came in; and the memory.
    """
    residual = hidden.float() if layer.config.fp32_residual_connection else hidden
    if memory is None:
        if not decode_experts.serves(layer.mlp, hidden.shape[0] * hidden.shape[1]):
            return layer(hidden_states=hidden, attention_mask=None)[0], None
        added = decode_experts.add_few_experts(layer.mlp, hidden, residual, layer.pre_mlp_layernorm)
        return added, None
    norm, mixer = layer.input_layernorm, layer.self_attention
    if isinstance(memory, KeyValueCache):
        mixed, group = attend(mixer, hidden, memory, span, rotary, norm), mixer.pg_collection.tp
        return add_projected(mixer.linear_proj, mixed, residual, layer.config, group), memory
    if not each_prefix and not _goes_step_by_step(hidden, memory, span):
        mixed, memory = mixer.mix(norm(hidden), memory, cu_seqlens=span.cu_seqlens, return_state=True)
        return residual + mixed, memory
    mixed, memory = _mix_few(mixer, norm, hidden, memory, room)
    if not each_prefix:
        memory = _last_of_each(memory, span)
    return add_projected(mixer.out_proj, mixed, residual, layer.config, mixer.tp_group), memory


def _goes_step_by_step(hidden_TNX: Tensor, state: GatedDeltaNetState, span: Span) -> bool:
    """Whether new tokens go through the rule one by one: a single one, or a short prompt in one launch."""
    if not span.is_batch or span.is_one_each:
        return span.is_one_each
    num_bytes = span.counts[0] * state.delta.numel() * state.delta.element_size()
    fits = span.counts[0] <= _PROMPT_STEPS and num_bytes <= _PROMPT_STATE_BYTES
    return fits and registry.is_fused(steps.OPERATION, hidden_TNX)


def _last_of_each(states: GatedDeltaNetState, span: Span) -> GatedDeltaNetState:
    """Return the state after each sequence's last token, copied out of those after every token."""
    tokens = span.counts[0]
    if tokens == 1:
        return states
    return GatedDeltaNetState(*(x.unflatten(0, (-1, tokens))[:, -1].clone() for x in (states.conv, states.delta)))


def _mix_few(
    mixer: GatedDeltaNet,
    norm: Any,
    hidden_TNX: Tensor,
    state: GatedDeltaNetState,
    room: GatedDeltaNetState | None = None,
) -> tuple[Tensor, GatedDeltaNetState]:
    """Norm and mix a few tokens up to the last projection, keeping the state after each.

    Returns: the output [T,N,Hv·V], and states of N·T rows, those of a sequence together.
    """
    weights = DeltaWeights(mixer.conv1d.weight.squeeze(1), mixer.A_log, mixer.dt_bias, mixer.out_norm.weight)
    heads = DeltaHeads(
        mixer.key_dim // mixer.key_head_dim,
        mixer.value_heads,
        mixer.key_head_dim,
        mixer.value_head_dim,
        mixer.config.layernorm_epsilon,
    )
    qkvz, beta_alpha = project_normed(
        norm, (mixer.in_proj, mixer.beta_alpha_proj), hidden_TNX, mixer.config, mixer.tp_group
    )
    mixed, conv, delta = steps.delta_steps(
        qkvz, beta_alpha, weights, heads, state.conv, state.delta, out=None if room is None else (room.conv, room.delta)
    )
    return mixed, GatedDeltaNetState(conv, delta)
