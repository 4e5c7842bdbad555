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

Shapes: as in decode_state.py; V vocabulary, X hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from megatron_q3n.kernels.delta_mixer import DeltaHeads, DeltaWeights
from megatron_q3n.kernels.delta_steps import delta_steps
from megatron_q3n.model.cached_attention import Rotary, attend
from megatron_q3n.model.decode_state import DecodeState, KeyValueCache, Memory, Span, mtp_layers
from megatron_q3n.model.gated_delta_net import GatedDeltaNet, GatedDeltaNetState

_SEQUENCE_PARALLEL = (
    "sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings",
)  # fmt: skip


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """Put a model into evaluation and out of sequence parallelism, and back.

    A single token cannot be split over ranks; every rank holds all tokens instead.
    """
    parts = [part for module in model.modules() for part in (module, getattr(module, "config", 0))]
    switched = {
        (id(part), name): part
        for part in parts
        for name in _SEQUENCE_PARALLEL
        if getattr(part, name, False) is True
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
    model: Any, tokens_S: Tensor, span: Span, state: DecodeState, *, each_prefix: bool = False
) -> Tensor:
    """Run new tokens through the trunk, and remember them in `state`.

    The state counts them only when `DecodeState.settle` is called: all of them, or with `each_prefix`
    (few tokens of every sequence) any number of them, for which all their states are kept till then.
    Returns: hidden [S,X] after the final norm.
    """
    hidden = _embed(model, tokens_S, span)
    rotary = rotary_of(model, span)
    for number, layer in enumerate(model.decoder.layers):
        hidden, state.layers[number] = run_layer(
            layer, hidden, state.layers[number], span, rotary, each_prefix
        )
    state.prefixes = span.counts[0] if each_prefix else 1
    return span.flatten(model.decoder.final_norm(hidden))


def extend_mtp(
    model: Any, hidden_SX: Tensor, next_tokens_S: Tensor, span: Span, state: DecodeState
) -> Tensor:
    """Run the MTP layer at the span's positions, and write its keys and values.

    Shapes: hidden [S,X], the trunk's (or the layer's own, when drafting further) at these positions;
        next tokens [S], the token after each.
    Returns: hidden [S,X], whose logits are for the token after the next.
    """
    mtp = model.mtp.layers[0]
    hidden = mtp._concat_embeddings(span.arrange(hidden_SX), _embed(model, next_tokens_S, span))
    rotary = rotary_of(model, span)
    for number, layer in enumerate(mtp_layers(model)):
        hidden, state.mtp[number] = run_layer(layer, hidden, state.mtp[number], span, rotary, False)
    return span.flatten(mtp.final_layernorm(hidden))


def logits_of(model: Any, hidden_SX: Tensor) -> Tensor:
    """Return fp32 logits over the whole vocabulary [S,V], gathered from tensor-parallel ranks."""
    logits, _ = model.output_layer(hidden_SX.unsqueeze(1), runtime_gather_output=True)
    return logits.squeeze(1).float()


def _embed(model: Any, tokens_S: Tensor, span: Span) -> Tensor:
    """Return embeddings as the span arranges them; RoPE is the only thing that knows positions."""
    return model.embedding(input_ids=span.arrange(tokens_S).transpose(0, 1), position_ids=None)


def rotary_of(model: Any, span: Span) -> Rotary:
    """Return RoPE at the span's positions."""
    dtype = model.decoder.final_norm.weight.dtype
    return Rotary.at(span.arrange(span.position_S), model.rotary_pos_emb, dtype)


def run_layer(
    layer: Any, hidden: Tensor, memory: Memory, span: Span, rotary: Rotary, each_prefix: bool
) -> tuple[Tensor, Memory]:
    """Run one sublayer: a mixer with its memory, or experts, which have none."""
    if memory is None:
        return layer(hidden_states=hidden, attention_mask=None)[0], None
    normed = layer.input_layernorm(hidden)
    residual = hidden.float() if layer.config.fp32_residual_connection else hidden
    if isinstance(memory, KeyValueCache):
        mixed = attend(layer.self_attention, normed, memory, span, rotary)
    elif each_prefix or span.is_one_each:
        mixed, memory = _mix_few(layer.self_attention, normed, memory)
    else:
        mixed, memory = layer.self_attention.mix(
            normed, memory, cu_seqlens=span.cu_seqlens, return_state=True
        )
    return layer.self_attn_bda(False, False)((mixed, None), residual, 0.0), memory


def _mix_few(
    mixer: GatedDeltaNet, hidden_TNX: Tensor, state: GatedDeltaNetState
) -> tuple[Tensor, GatedDeltaNetState]:
    """Mix a few tokens, keeping the state after each.

    Returns: the output [T,N,X], and states of N·T rows, those of a sequence together.
    """
    weights = DeltaWeights(
        mixer.conv1d.weight.squeeze(1), mixer.A_log, mixer.dt_bias, mixer.out_norm.weight
    )
    heads = DeltaHeads(
        mixer.key_dim // mixer.key_head_dim,
        mixer.value_heads,
        mixer.key_head_dim,
        mixer.value_head_dim,
        mixer.config.layernorm_epsilon,
    )
    qkvz, beta_alpha = mixer.in_proj(hidden_TNX)[0], mixer.beta_alpha_proj(hidden_TNX)[0]
    mixed, conv, delta = delta_steps(qkvz, beta_alpha, weights, heads, state.conv, state.delta)
    return mixer.out_proj(mixed)[0], GatedDeltaNetState(conv, delta)
