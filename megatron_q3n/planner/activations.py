"""Activation memory of one micro-batch on one rank, tensor by tensor.

Each sublayer has a list of the tensors that autograd saves for the backward pass, each with its bytes and the recompute
modules (activation checkpointing) that drop it, and the transient bytes that exist only during the sublayer's backward
pass. The lists are the formulas. Symbols:

    T  tokens of a micro-batch on a rank: micro_batch_size · sequence_length / context parallel size
    S  T / tensor parallel size: tokens of the sequence-parallel regions (norms, residual, router)
    D  token copies on an expert rank: S · top-k · expert tensor parallel size · (1 + EXPERT_IMBALANCE)
    a  bytes of an activation: 2 in bf16, 4 in fp32;  g  of a saved matrix product input: a, or 1 in FP8

Context parallelism by all-to-all exchanges sequence for heads, which does not change the bytes. Counted as on a GPU:
attention, pre-norms and delta rule are fused (no score matrix, one chunk matrix per head). In bf16 the operations
around the delta rule and the experts are fused too (kernels/gated_delta, kernels/moe); in fp32 they are plain torch,
whose intermediate values are saved, and on a CPU the Gated DeltaNet layer saves about twice as much again. Not counted:
masks, indices, statistics of a norm.

Measured on an H200 in bf16: a period at the released model's width, 16,384 tokens, 128 experts 19.1 GiB (these formulas
with its weights and gradients, balanced: 19.4); pretrain-small 10.0 GiB at its peak.
"""

from dataclasses import dataclass

from megatron_q3n.config import GATED_DELTA_NET, ModelConfig, RunConfig
from megatron_q3n.config.model import MOE
from megatron_q3n.config.moe_rules import expert_exchange_obstacle

# the fullest expert rank gets this much more than its even share of tokens
EXPERT_IMBALANCE = 0.25
_FP32 = 4


@dataclass(frozen=True)
class Saved:
    """One tensor saved for the backward pass."""

    name: str
    bytes: float
    dropped_by: tuple[str, ...] = ()
    """Members of training.recompute_modules that recompute it instead."""


@dataclass(frozen=True)
class Footprint:
    """Activations of one part of the model for one micro-batch on one rank. Units: bytes."""

    saved: tuple[Saved, ...]
    transient: float = 0.0

    def saved_bytes(self, recompute: frozenset[str] = frozenset()) -> float:
        """Return the bytes saved from forward to backward under selective recomputation of these modules."""
        return sum(s.bytes for s in self.saved if recompute.isdisjoint(s.dropped_by))

    def backward_bytes(self, recompute: frozenset[str] = frozenset()) -> float:
        """Return the additional bytes during this part's backward pass: transient and recomputed tensors."""
        return self.transient + self.saved_bytes() - self.saved_bytes(recompute)


@dataclass(frozen=True)
class LocalSizes:
    """Sizes of a micro-batch on one rank; the symbols of the module docstring."""

    tokens: float
    shard_tokens: float
    dispatched: float
    gathered: float
    """Tokens that the allgather dispatcher gathers; 0 with all-to-all."""
    tensor_ranks: int
    expert_tensor_ranks: int
    value: int
    product_input: int
    widened: int
    """Bytes per element of a norm's fp32 copy of its input; 0 if the input is fp32."""
    fused: bool
    """Whether the fused kernels run (in bf16)."""

    @classmethod
    def of(cls, config: RunConfig) -> "LocalSizes":
        """Compute the sizes from a run's configuration."""
        parallel, training = config.parallel, config.training
        ranks, expert_ranks = (parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size)
        batch_tokens = training.micro_batch_size * training.sequence_length
        tokens = batch_tokens / parallel.context_parallel_size
        shard = tokens / ranks
        group = parallel.expert_model_parallel_size * expert_ranks
        value = 2 if config.precision.compute == "bf16" else _FP32
        return cls(
            tokens=tokens,
            shard_tokens=shard,
            dispatched=shard * config.model.moe_router_topk * expert_ranks * (1 + EXPERT_IMBALANCE),
            gathered=shard * group if parallel.moe_token_dispatcher_type == "allgather" else 0,
            tensor_ranks=ranks,
            expert_tensor_ranks=expert_ranks,
            value=value,
            product_input=1 if config.precision.fp8 else value,
            widened=_FP32 if value < _FP32 else 0,
            fused=config.precision.compute == "bf16",
        )

    def hidden(self, model: ModelConfig) -> float:
        """Return the bytes of one residual stream, S · hidden_size · a."""
        return self.shard_tokens * model.hidden_size * self.value


def sublayer(config: RunConfig, symbol: str) -> Footprint:
    """Return the footprint of one megatron-core layer: G, *, S or E."""
    if symbol == GATED_DELTA_NET:
        return gated_delta_net(config)
    return mixture_of_experts(config) if symbol == MOE else gated_attention(config)


def gated_delta_net(config: RunConfig) -> Footprint:
    """Return the footprint of Gated DeltaNet; its recomputation covers everything from in_proj's output to out_proj.

    Fused, convolution, L2 norm and gated output norm save only the inputs of the delta rule; in plain torch each saves
    its intermediate values, the norms in fp32. Transient: the gradient of q|k|v|z, and one state and its gradient per
    chunk and value head (the chunked backward pass recomputes the states instead of saving them).
    """
    model, at = config.model, LocalSizes.of(config)
    t = at.tokens / at.tensor_ranks
    heads, rule = model.linear_num_value_heads, ("gated_delta_net",)
    state = heads * model.linear_key_head_dim * model.linear_value_head_dim
    qkvz = t * (2 * model.key_dim + 2 * model.value_dim) * at.value
    if at.fused:
        around = [Saved("q, k, v of the rule", t * model.conv_dim * at.value, rule)]
    else:
        around = [
            Saved("shifted and convolved q|k|v", 2 * t * model.conv_dim * at.value, rule),
            Saved("activated q|k|v", t * model.conv_dim * at.value, rule),
            Saved("normalized q|k", t * 2 * model.key_dim * (at.value + at.widened), rule),
            Saved("norm and gate", t * model.value_dim * 2 * (_FP32 + at.widened), rule),
        ]
    return Footprint(
        (
            *_normed_input(config, at.product_input),
            Saved("q|k|v|z", qkvz),
            Saved("beta, decay", t * 2 * heads * _FP32),
            *around,
            Saved("chunk matrices", t * heads * model.linear_chunk_size * at.value, rule),
            Saved("output of the rule", t * model.value_dim * at.value, rule),
            Saved("input of out_proj", t * model.value_dim * at.product_input),
        ),
        transient=qkvz + 2 * t / model.linear_chunk_size * state * at.value,
    )


def gated_attention(config: RunConfig) -> Footprint:
    """Return the footprint of gated attention. Transient: the gradient of the projections' output.

    The attention core saves little besides its output, which the gate needs too, so recomputing `core_attn` frees
    almost nothing.
    """
    model, at = config.model, LocalSizes.of(config)
    t = at.tokens / at.tensor_ranks
    query = model.num_attention_heads * model.kv_channels
    kv = 2 * model.num_query_groups * model.kv_channels
    gate = t * model.gate_heads * model.gate_width
    projected = t * (query + kv) * at.value + gate * at.value
    ungated = t * (query if model.attention_gate_position == "output" else kv / 2) * at.value
    return Footprint(
        (
            *_normed_input(config, at.product_input),
            Saved("query|gate|key|value", projected),
            Saved("rotated q|k, value", t * (query + kv) * at.value),
            Saved("softmax statistics", t * model.num_attention_heads * _FP32, ("core_attn",)),
            *((Saved("gate input, sigmoid", ungated + gate * _FP32),) if gate else ()),
            Saved("input of linear_proj", t * query * at.product_input),
        ),
        transient=projected,
    )


def mixture_of_experts(config: RunConfig) -> Footprint:
    """Return the footprint of router, routed and shared experts.

    Transient: three copies of the dispatched tokens (permuted, exchanged and sorted by expert), and with the allgather
    dispatcher the gathered tokens with their fp32 probabilities and mask. With our exchange: two copies (an expert's
    output and its gradient), and the buffers that peers read, which all layers share.
    """
    model, at = config.model, LocalSizes.of(config)
    ffn = model.moe_ffn_hidden_size / at.expert_tensor_ranks
    shared = at.tokens * model.moe_shared_expert_intermediate_size / at.tensor_ranks
    inside, shared_only = ("moe",), ("moe", "shared_experts")
    gathered = model.hidden_size * at.value + model.num_moe_experts * (_FP32 + 1)
    product = at.dispatched * 2 * ffn * at.value
    is_expert_parallel = config.parallel.expert_model_parallel_size * at.expert_tensor_ranks > 1
    # FP8 experts that are all local save each token once, not once per expert
    saved_tokens = at.shard_tokens if config.precision.fp8 and not is_expert_parallel else at.dispatched
    return Footprint(
        (
            *_normed_input(config, at.value),
            Saved("router", at.shard_tokens * model.num_moe_experts * (3 * _FP32 + 1), inside),
            Saved("tokens", saved_tokens * model.hidden_size * at.product_input, inside),
            Saved("gate|up", at.dispatched * 2 * ffn * at.value, inside),
            *(() if at.fused else (Saved("SiLU, product", product, (*inside, "moe_act")),)),
            Saved("activated", at.dispatched * ffn * at.product_input, (*inside, "moe_act")),
            Saved("shared gate|up", shared * 2 * at.value, shared_only),
            Saved("shared activated", shared * at.product_input, shared_only),
            Saved("shared output", at.hidden(model), shared_only),
        ),
        transient=_exchanged(config, at) + at.gathered * gathered,
    )


def _exchanged(config: RunConfig, at: LocalSizes) -> float:
    """Return the transient bytes of the dispatch: copies of rows, and the buffers of the expert exchange."""
    model, ranks = config.model, config.parallel.expert_model_parallel_size
    rows = at.dispatched * model.hidden_size * at.value
    if expert_exchange_obstacle(config) is not None:
        return 3 * rows
    # kernels/moe/expert_exchange.py: tokens, partial sums, routing map, gates, gradients of the gates
    per_token = (1 + ranks) * model.hidden_size * at.value + 5 * model.num_moe_experts
    per_token += ranks * model.moe_router_topk * _FP32
    return 2 * rows + at.shard_tokens * per_token


def mtp_projection(config: RunConfig) -> Footprint:
    """Return the footprint of one MTP depth besides its layer: both norms, eh_proj's input, the final norm."""
    model, at = config.model, LocalSizes.of(config)
    return Footprint(
        (
            Saved("hidden and embedding", 2 * at.hidden(model)),
            Saved("input of eh_proj", 2 * at.hidden(model)),
            Saved("final norm", at.hidden(model), ()),
        )
    )


def head(config: RunConfig) -> Footprint:
    """Return the footprint of the output layer and its loss: its input, and the softmax in fp32 (T · vocabulary · 4).

    Transient: the logits' gradient in the compute dtype (forward: the logits themselves).
    """
    model, at = config.model, LocalSizes.of(config)
    logits = at.tokens * model.vocab_size / at.tensor_ranks
    return Footprint(
        (Saved("normed hidden state", 2 * at.hidden(model)), Saved("softmax", logits * _FP32)),
        transient=logits * at.value,
    )


def _normed_input(config: RunConfig, value_bytes: int) -> tuple[Saved, Saved]:
    """Return every sublayer's first two tensors: the residual stream, and the pre-norm's output."""
    model, at = config.model, LocalSizes.of(config)
    normed = at.shard_tokens * model.hidden_size * value_bytes
    return Saved("residual stream", at.hidden(model)), Saved("normed", normed, ("layernorm",))
