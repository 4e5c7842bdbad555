"""Sizes derived from the model's dimensions: weight shapes, parameter counts, FLOPs per token, pipeline segments.

The lists of weights below hold, for each sublayer, every tensor of the megatron-core model with its unsharded shape and
the way it is sharded. The parameter count, the memory planner and the FLOP formula all use these lists, so that they
agree. No torch here: a dry run and the metrics need these numbers without importing megatron-core. The bytes of a
tensor (dtype, optimizer states, activations) are computed in `planner`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Literal, get_args

from megatron_q3n.config.model import GATED_ATTENTION, GATED_DELTA_NET, MOE, SLIDING_ATTENTION, ModelConfig

Group = Literal[
    "embedding",
    "head",
    "gated_delta_net",
    "gated_attention",
    "routed_experts",
    "shared_expert",
    "router",
    "norms",
    "mtp",
]
Split = Literal["tensor", "expert", "none"]

MTP_PATTERN = GATED_ATTENTION + MOE  # the layer inside each multi-token prediction depth
# the backward pass multiplies twice: for the input's gradient and for the weight's
_FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Weight:
    """One parameter tensor, unsharded.

    split: "tensor" is sharded over tensor-parallel ranks, "expert" over expert- and expert-tensor-parallel ranks,
    "none" is replicated. low_precision: its matrix product runs in FP8 when `precision.fp8` is set, and FP8 copies of
    it are held row-wise and column-wise.
    """

    name: str
    shape: tuple[int, ...]
    group: Group
    split: Split = "none"
    low_precision: bool = False

    @property
    def count(self) -> int:
        """Return the number of parameters."""
        return prod(self.shape)


def embedding_weights(model: ModelConfig) -> list[Weight]:
    """Return the weights of the first pipeline stage before its sublayers."""
    return [Weight("word_embeddings", (model.vocab_size, model.hidden_size), "embedding", "tensor")]


def head_weights(model: ModelConfig) -> list[Weight]:
    """Return the weights of the last pipeline stage after its sublayers, MTP excepted."""
    return [
        Weight("final_norm", (model.hidden_size,), "norms"),
        Weight("output_layer", (model.vocab_size, model.hidden_size), "head", "tensor"),
    ]


def sublayer_weights(model: ModelConfig, symbol: str) -> list[Weight]:
    """Return the tensors of one megatron-core layer: G, *, S or E, each with its pre-norm."""
    weights = {
        GATED_DELTA_NET: _gated_delta_net_weights,
        GATED_ATTENTION: _gated_attention_weights,
        SLIDING_ATTENTION: _gated_attention_weights,
        MOE: _moe_weights,
    }
    return weights[symbol](model)


def mtp_depth_weights(model: ModelConfig) -> list[Weight]:
    """Return the tensors of one multi-token prediction depth; it shares embedding and head with the trunk."""
    hidden = model.hidden_size
    join = [
        Weight("enorm", (hidden,), "norms"),
        Weight("hnorm", (hidden,), "norms"),
        Weight("eh_proj", (hidden, 2 * hidden), "mtp", "tensor"),
        Weight("final_layernorm", (hidden,), "norms"),
    ]
    return join + [w for symbol in MTP_PATTERN for w in sublayer_weights(model, symbol)]


def mtp_weights(model: ModelConfig) -> list[Weight]:
    """Return the tensors of all MTP depths; a repeated layer is counted once."""
    held_once = model.mtp_use_repeated_layer and model.mtp_num_layers > 0
    return mtp_depth_weights(model) * (1 if held_once else model.mtp_num_layers)


def trunk_weights(model: ModelConfig) -> list[Weight]:
    """Return every tensor of the model except those of MTP."""
    layers = [w for symbol in model.main_pattern for w in sublayer_weights(model, symbol)]
    return embedding_weights(model) + layers + head_weights(model)


def pipeline_segments(model: ModelConfig, num_segments: int) -> list[str]:
    """Split the sublayers into consecutive pipeline segments, as evenly as possible.

    If they are not divisible, the first segments get one more: the last one also holds head and MTP.
    Returns: megatron-core's symbols of each segment; with `"|".join` the trunk's part of its hybrid layer pattern.
    Virtual stages: rank r of p holds segments r, r + p, r + 2p, …
    """
    size, longer = divmod(model.megatron_num_layers, num_segments)
    sizes = [size + (segment < longer) for segment in range(num_segments)]
    ends = list(accumulate(sizes))
    return [model.main_pattern[end - size : end] for end, size in zip(ends, sizes)]


def _gated_delta_net_weights(model: ModelConfig) -> list[Weight]:
    hidden, heads = model.hidden_size, model.linear_num_value_heads
    return [
        Weight("input_layernorm", (hidden,), "norms"),
        Weight("in_proj", (2 * model.key_dim + 2 * model.value_dim, hidden), "gated_delta_net", "tensor", True),
        Weight("beta_alpha_proj", (2 * heads, hidden), "gated_delta_net", "tensor"),
        Weight("conv1d", (model.conv_dim, 1, model.linear_conv_kernel_dim), "gated_delta_net", "tensor"),
        Weight("A_log", (heads,), "gated_delta_net", "tensor"),
        Weight("dt_bias", (heads,), "gated_delta_net", "tensor"),
        Weight("out_norm", (model.linear_value_head_dim,), "norms"),
        Weight("out_proj", (hidden, model.value_dim), "gated_delta_net", "tensor", True),
    ]


def _gated_attention_weights(model: ModelConfig) -> list[Weight]:
    hidden, head = model.hidden_size, model.kv_channels
    query = model.num_attention_heads * head
    gate = model.gate_heads * model.gate_width
    gate_in_qkv = gate if model.gate_is_in_query_projection else 0
    qkv = query + gate_in_qkv + 2 * model.num_query_groups * head
    split: Split = "none" if model.attention_gate_shared else "tensor"
    separate_gate = [Weight("linear_gate", (gate, hidden), "gated_attention", split)]
    return [
        Weight("input_layernorm", (hidden,), "norms"),
        Weight("linear_qkv", (qkv, hidden), "gated_attention", "tensor", True),
        Weight("q_layernorm", (head,), "norms"),
        Weight("k_layernorm", (head,), "norms"),
        Weight("linear_proj", (hidden, query), "gated_attention", "tensor", True),
        *(separate_gate if gate and not gate_in_qkv else ()),
    ]


def _moe_weights(model: ModelConfig) -> list[Weight]:
    hidden, experts = model.hidden_size, model.num_moe_experts
    ffn, shared = model.moe_ffn_hidden_size, model.moe_shared_expert_intermediate_size
    return [
        Weight("pre_mlp_layernorm", (hidden,), "norms"),
        Weight("router", (experts, hidden), "router"),
        Weight("experts.fc1", (experts, 2 * ffn, hidden), "routed_experts", "expert", True),
        Weight("experts.fc2", (experts, hidden, ffn), "routed_experts", "expert", True),
        Weight("shared_experts.fc1", (2 * shared, hidden), "shared_expert", "tensor", True),
        Weight("shared_experts.fc2", (hidden, shared), "shared_expert", "tensor", True),
        Weight("shared_experts.gate", (1, hidden), "shared_expert"),
    ]


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the whole model; `groups` holds every group, MTP as one."""

    groups: dict[Group, int]
    active: int
    """Active parameters per token, without embedding, head and MTP."""

    @property
    def mtp(self) -> int:
        """Return the parameters of all MTP depths."""
        return self.groups["mtp"]

    @property
    def total(self) -> int:
        """Return all parameters without MTP: the figure in model names."""
        return sum(self.groups.values()) - self.mtp

    @property
    def total_with_mtp(self) -> int:
        """Return all parameters."""
        return sum(self.groups.values())

    @property
    def active_with_embeddings(self) -> int:
        """Return `active` plus embedding and head."""
        return self.active + self.groups["embedding"] + self.groups["head"]


def parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of a model by group."""
    groups = _by_group(trunk_weights(model))
    active = {**groups, "routed_experts": groups["routed_experts"] * _experts_per_token(model)}
    groups["mtp"] = sum(w.count for w in mtp_weights(model))
    return ParameterCount(groups, sum(round(n) for group, n in active.items() if group not in ("embedding", "head")))


def _by_group(weights: Iterable[Weight]) -> dict[Group, int]:
    counts: dict[Group, int] = dict.fromkeys(get_args(Group), 0)
    for weight in weights:
        counts[weight.group] += weight.count
    return counts


def _experts_per_token(model: ModelConfig) -> float:
    """Return the share of the routed experts that is active for one token."""
    return model.moe_router_topk / model.num_moe_experts


@dataclass(frozen=True)
class FlopCount:
    """Floating-point operations per token, by part of the model; `mtp` includes its own head."""

    projections: float
    delta_rule: float
    attention_core: float
    routed_experts: float
    shared_expert: float
    router: float
    head: float
    mtp: float

    @property
    def total(self) -> float:
        """Return the sum over all groups."""
        return sum(vars(self).values())


def flops_per_token(
    model: ModelConfig, sequence_length: int, *, training: bool = True, with_mtp: bool = True
) -> FlopCount:
    """Count the model FLOPs of one token, averaged over a sequence.

    Counted, at 2 per multiply-add, forward: every weight matrix and the convolution once per token (routed experts
    top-k of all); the delta rule in its recurrent form, four passes over each value head's state (decay, read by key,
    rank-one update, read by query): 8 · key_head_dim · value_head_dim; causal attention's two products over half of
    the sequence on average: 2 · heads · head_dim · sequence_length; with a window of W tokens W · (1 - W / 2
    sequence_length) tokens on average instead. Each MTP depth adds eh_proj, its layer and one
    more head. Training multiplies by 3 (the backward pass is twice the forward). Not counted: other element-wise
    work, norms, softmax, the embedding look-up, the additional operations of the chunked delta rule and of
    recomputation (activation checkpointing). So MFU is computed from model FLOPs, not from the operations that kernels
    execute.

    Units: `sequence_length` in tokens; without document masking, which shortens attention.
    Reference: recurrent form, Gated Delta Networks (arXiv 2412.06464), eq. 10.
    """
    passes = _FORWARD_AND_BACKWARD if training else 1
    core = 2.0 * model.num_attention_heads * model.kv_channels * sequence_length
    state = model.linear_num_value_heads * model.linear_key_head_dim * model.linear_value_head_dim
    trunk = _multiply_adds(trunk_weights(model), model)
    depth = sum(_multiply_adds(mtp_depth_weights(model), model).values()) + trunk["head"]
    return FlopCount(
        projections=passes * 2 * (trunk["gated_delta_net"] + trunk["gated_attention"]),
        delta_rule=passes * 8.0 * state * model.mixers.count(GATED_DELTA_NET),
        attention_core=passes * core * _full_attentions(model, sequence_length),
        routed_experts=passes * 2 * trunk["routed_experts"],
        shared_expert=passes * 2 * trunk["shared_expert"],
        router=passes * 2 * trunk["router"],
        head=passes * 2 * trunk["head"],
        mtp=passes * (2 * depth + core) * (model.mtp_num_layers if with_mtp else 0),
    )


def _full_attentions(model: ModelConfig, sequence_length: int) -> float:
    """Count the trunk's attention layers; one with a window counts by its share of the keys of causal attention."""
    window = min(model.attention_window_tokens or sequence_length, sequence_length)
    share = 2 * window / sequence_length - (window / sequence_length) ** 2
    return model.mixers.count(GATED_ATTENTION) + model.mixers.count(SLIDING_ATTENTION) * share


def _multiply_adds(weights: Iterable[Weight], model: ModelConfig) -> dict[Group, float]:
    """Return multiply-adds per token and group: one per matrix element; none for vectors and the embedding."""
    matrices = [w for w in weights if len(w.shape) > 1 and w.group != "embedding"]
    counts: dict[Group, float] = dict(_by_group(matrices))
    counts["routed_experts"] *= _experts_per_token(model)
    return counts
