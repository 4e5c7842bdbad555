"""Incremental forward pass of the model: prefill, chunked prefill, decoding, and verification of draft tokens.

HybridModel.forward cannot carry state through Gated DeltaNet, so this module runs its sublayers one by one: embedding,
sublayers, final norm, output layer, all megatron-core's own with its own weights. One function serves whole prompts,
chunks of prompts, single tokens and draft tokens; these differ only in how many tokens each sequence brings (`Span`).

**Draft tokens.** The multi-token prediction (MTP) layer gets the trunk's hidden state at position t and the embedding
of token t+1, and predicts token t+2. Its KV cache holds the keys and values of every such t whose next token is known.
For further drafts the layer is repeated: its own output at t and the drafted token t+2 are its input at position t+1.
It attends to the depth-1 keys and values of the prefix and to those of earlier drafts, which are overwritten once the
trunk has verified the tokens.

**FP8** is not used here: products of one token are too small for it, and bound by memory bandwidth.

**Kernel launches.** With few tokens the time goes into kernel launches and the Python around them. Such passes use
fused kernels on the same weights (experts.py, fused_linear.py, attention.py) and have no host synchronization
(`Span.from_device_starts`), so that a whole pass can be captured and replayed as a CUDA graph.

Shapes: as in state.py; V vocabulary, X hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from megatron_q3n.config.execution_plan import DecodePlan
from megatron_q3n.kernels.decode import gated_delta as decode_gated_delta
from megatron_q3n.model.decode import experts as decode_experts
from megatron_q3n.model.decode.attention import attend
from megatron_q3n.model.decode.fused_linear import (
    compute_raw_logits,
    norm_and_project,
    project_and_add,
    project_mtp_inputs,
)
from megatron_q3n.model.decode.protocols import DecodeModel, Sublayer
from megatron_q3n.model.decode.span import Span
from megatron_q3n.model.decode.state import DecodeState, KVCache, LayerState, mtp_layers
from megatron_q3n.model.gated_delta_net import GatedDeltaNet, GatedDeltaNetState
from megatron_q3n.model.protocols import Norm
from megatron_q3n.model.rope import RopeAngles, RopeTable

# A prompt up to this length runs through the delta rule token by token in one kernel launch, which writes the state
# after each token. That is faster than the chunked kernels, which also compile anew for each new length.
_MAX_STEPWISE_PROMPT_TOKENS = 128
_MAX_STEPWISE_STATE_BYTES = 256 * 2**20
# positions
_INITIAL_ROPE_TABLE_LENGTH = 1024
_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def generating(model: DecodeModel) -> Iterator[None]:
    """Set evaluation mode and disable sequence parallelism inside the context.

    A single token cannot be split over ranks, so every tensor-parallel rank holds all tokens.
    """
    parts = [part for module in model.modules() for part in (module, getattr(module, "config", 0))]
    disabled = {
        (id(part), name): part for part in parts for name in _SEQUENCE_PARALLEL if getattr(part, name, False) is True
    }
    was_training = model.training
    model.eval()
    for (_, name), part in disabled.items():
        setattr(part, name, False)
    try:
        yield
    finally:
        for (_, name), part in disabled.items():
            setattr(part, name, True)
        model.train(was_training)


def extend(
    model: DecodeModel,
    tokens_S: Tensor,
    span: Span,
    state: DecodeState,
    *,
    state_per_token: bool = False,
    apply_final_norm: bool = True,
) -> Tensor:
    """Run new tokens through the trunk, and write their keys, values and recurrent states into `state`.

    The sequences' lengths change only with `DecodeState.commit`. With `state_per_token` (few tokens of every sequence)
    the recurrent state after each token is kept until then, so that any number of the tokens can be committed.

    Returns: hidden [S,X] after the final norm; before it with `apply_final_norm=False`, for
        `fused_linear.norm_and_logits`.
    """
    hidden = _embed(model, tokens_S, span)
    rope = rope_for_span(model, span, state)
    buffers = state.begin_draft(span.counts[0]) if state_per_token else {}
    for number, layer in enumerate(model.decoder.layers):
        layer_state = state.layers[number]
        hidden, new_state = run_layer(layer, hidden, layer_state, span, rope, state_per_token, buffers.get(number))
        if state_per_token and isinstance(new_state, GatedDeltaNetState):
            state.draft_states[number] = new_state
        else:
            state.layers[number] = new_state
    return span.flatten(model.decoder.final_norm(hidden) if apply_final_norm else hidden)


def extend_mtp(
    model: DecodeModel,
    hidden_SX: Tensor,
    next_tokens_S: Tensor,
    span: Span,
    state: DecodeState,
    *,
    apply_final_norm: bool = True,
) -> Tensor:
    """Run the MTP layer at the span's positions, and write its keys and values into `state`.

    Shapes: hidden [S,X], the trunk's at these positions, or the layer's own when drafting further; next tokens [S], the
        token after each position.
    Returns: hidden [S,X], whose logits predict the token after the next; before the layer's final norm with
        `apply_final_norm=False`.
    """
    mtp = model.mtp.layers[0]
    hidden = project_mtp_inputs(mtp, span.arrange(hidden_SX), _embed(model, next_tokens_S, span))
    rope = rope_for_span(model, span, state)
    for number, layer in enumerate(mtp_layers(model)):
        hidden, state.mtp[number] = run_layer(layer, hidden, state.mtp[number], span, rope, False)
    return span.flatten(mtp.final_layernorm(hidden) if apply_final_norm else hidden)


def compute_logits(model: DecodeModel, hidden_SX: Tensor) -> Tensor:
    """Return fp32 logits over the whole vocabulary [S,V], gathered from tensor-parallel ranks."""
    return compute_raw_logits(model, hidden_SX).float()


def _embed(model: DecodeModel, tokens_S: Tensor, span: Span) -> Tensor:
    """Return embeddings in the span's layout; positions enter through RoPE only."""
    return model.embedding(input_ids=span.arrange(tokens_S).transpose(0, 1), position_ids=None)


def rope_for_span(model: DecodeModel, span: Span, state: DecodeState) -> RopeAngles | RopeTable:
    """Return RoPE at the span's positions, from the state's table where the pairing of channels allows it."""
    dtype, embedding = model.decoder.final_norm.weight.dtype, model.rotary_pos_emb
    if embedding.rotary_interleaved:
        return RopeAngles.at(span.arrange(span.position_S), embedding, dtype)
    num_positions = max(span.ends)
    if state.rope_table_LW is None or len(state.rope_table_LW) < num_positions:
        # longer than needed, so that reallocations are rare
        length = max(num_positions * 3 // 2, _INITIAL_ROPE_TABLE_LENGTH)
        state.rope_table_LW = RopeTable.build(length, embedding, dtype)
    return RopeTable(state.rope_table_LW, span)


def run_layer(
    layer: Sublayer,
    hidden: Tensor,
    layer_state: LayerState,
    span: Span,
    rope: RopeAngles | RopeTable,
    state_per_token: bool,
    state_buffer: GatedDeltaNetState | None = None,
) -> tuple[Tensor, LayerState]:
    """Run one sublayer: a mixer with its state, or an MoE layer, which has none.

    `state_buffer` is an optional output buffer for the states after each token.

    Returns: hidden, possibly in the memory of the input; and the new state.
    """
    residual = hidden.float() if layer.config.fp32_residual_connection else hidden
    if layer_state is None:
        if not decode_experts.runs_in_place(layer.mlp, hidden.shape[0] * hidden.shape[1]):
            return layer(hidden_states=hidden, attention_mask=None)[0], None
        added = decode_experts.add_moe_output(layer.mlp, hidden, residual, layer.pre_mlp_layernorm)
        return added, None
    norm, mixer = layer.input_layernorm, layer.self_attention
    if isinstance(layer_state, KVCache):
        mixed = attend(mixer, hidden, layer_state, span, rope, norm)
        return project_and_add(mixer.linear_proj, mixed, residual, layer.config), layer_state
    if not state_per_token and not _runs_stepwise(layer.config.plan.decode, layer_state, span):
        mixed, layer_state = mixer.mix(norm(hidden), layer_state, packing=span.packing, return_state=True)
        return residual + mixed, layer_state
    mixed, layer_state = _run_stepwise(mixer, norm, hidden, layer_state, state_buffer)
    if not state_per_token:
        layer_state = _last_state_per_sequence(layer_state, span)
    return project_and_add(mixer.out_proj, mixed, residual, layer.config), layer_state


def _runs_stepwise(plan: DecodePlan, state: GatedDeltaNetState, span: Span) -> bool:
    """Return whether new tokens run through the delta rule one by one: a token, or a short prompt in one launch."""
    if not span.is_batch or span.is_one_each:
        return span.is_one_each
    num_bytes = span.counts[0] * state.delta.numel() * state.delta.element_size()
    is_short = span.counts[0] <= _MAX_STEPWISE_PROMPT_TOKENS and num_bytes <= _MAX_STEPWISE_STATE_BYTES
    return is_short and bool(plan.gated_delta)


def _last_state_per_sequence(states: GatedDeltaNetState, span: Span) -> GatedDeltaNetState:
    """Return a copy of the state after each sequence's last token."""
    tokens = span.counts[0]
    if tokens == 1:
        return states
    return GatedDeltaNetState(*(x.unflatten(0, (-1, tokens))[:, -1].clone() for x in (states.conv, states.delta)))


def _run_stepwise(
    mixer: GatedDeltaNet,
    norm: Norm | None,
    hidden_TNX: Tensor,
    state: GatedDeltaNetState,
    state_buffer: GatedDeltaNetState | None = None,
) -> tuple[Tensor, GatedDeltaNetState]:
    """Run norm and Gated DeltaNet up to the output projection, token by token, with the state after each token.

    Returns: the output [T,N,Hv·V], and states of N·T rows, a sequence's rows adjacent.
    """
    weights, heads = mixer.delta_weights(), mixer.heads
    qkvz, beta_alpha = norm_and_project(norm, (mixer.in_proj, mixer.beta_alpha_proj), hidden_TNX, mixer.config)
    out = None if state_buffer is None else (state_buffer.conv, state_buffer.delta)
    mixed, conv, delta = decode_gated_delta.decode_gated_delta(
        qkvz,
        beta_alpha,
        weights,
        heads,
        state.conv,
        state.delta,
        fused=bool(mixer.config.plan.decode.gated_delta),
        out=out,
    )
    return mixed, GatedDeltaNetState(conv, delta)
