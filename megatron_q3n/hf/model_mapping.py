"""Weight mapping between Hugging Face and megatron-core: names, shapes and reshapes of all parameters.

Every megatron-core tensor is made of one or more Hugging Face tensors by moving rows, so that the inverse is exact. A
`ParamMapping` holds the names, shapes and functions of one parameter; `param_mappings(config)` returns all of them.
`to_megatron` and `to_hf` apply them to a dict in memory. A converter that must not hold a model in memory iterates over
the mappings: each reads only its own tensors. Both sides are unsharded here; sharding for tensor or expert parallelism
and files are in `checkpoint` and `conversion`, and megatron-core itself is not imported.

Differences between the two sides:
- q_proj, k_proj, v_proj are fused into one `linear_qkv`, per key/value head [queries | gates | key | value], so that
  tensor parallelism shards it by key/value heads.
- in_proj_qkvz and in_proj_ba, grouped by key head, become flat [q | k | v | z] and [beta | alpha]: the kernels take
  contiguous q, k and v, and the two projections may differ in dtype.
- Experts, separate in the Hugging Face format, are stacked for the grouped GEMM. transformers 5 holds the same stacks
  in memory; those are read too.
- `linear_attn.norm` is the one Hugging Face norm weight that is the scale itself. Ours is zero-centered (scale - 1) as
  in every other norm, so that weight decay pulls the scale to 1. This is a shift, which does not apply to gradients
  (`gradients=True`). Its result is at least fp32, whatever the input: bf16 is coarser around 0.3 - 1 than around 0.3,
  and storing the one in place of the other would lose bits. In fp32 itself the last bit may be lost for weights below 1
  (6e-8); nothing else is ever rounded.
- `mtp.fc` takes [embedding | hidden] and so does `eh_proj`. A swap of the halves would survive any round trip;
  tests/hf/test_model_mapping.py checks the positions of the values.

Names here are Qwen3-Next's; `Family` holds the differences of other families.

MTP depths beyond the first with their own layers have no Hugging Face names. `model/reference` names them mtp_deeper;
they are read, and refused on export. The same holds for attention gates outside the query projection, gate_proj.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from megatron_q3n.config import GATED_ATTENTION, GATED_DELTA_NET, ModelConfig, UserError
from megatron_q3n.hf.families import QWEN3_NEXT, Family
from megatron_q3n.hf.function_settings import check_function
from megatron_q3n.hf.param_mapping import HUGGING_FACE, MEGATRON, ParamMapping, Shape, check_names

HEAD = "lm_head.weight"


def to_megatron(
    hf: Mapping[str, Tensor], config: ModelConfig, gradients: bool = False, family: Family = QWEN3_NEXT
) -> dict[str, Tensor]:
    """Rename and reshape Hugging Face weights to megatron-core's; experts separate or stacked.

    gradients: the tensors are gradients of weights, to which the shift does not apply.
    Returns: unsharded tensors, some of them views of the input, in its dtypes but for the shifted norm.
    Raises: UserError naming the missing or unexpected tensors, or a wrong shape.
    """
    table = param_mappings(config, family)
    check_names(HUGGING_FACE, hf, [name for mapping in table for name in mapping.sources(hf)])
    return {mapping.megatron: mapping.to_megatron(hf, gradients) for mapping in table}


def to_hf(
    megatron: Mapping[str, Tensor], config: ModelConfig, gradients: bool = False, family: Family = QWEN3_NEXT
) -> dict[str, Tensor]:
    """Rename and reshape megatron-core's weights to the Hugging Face format, experts separate.

    Arguments, returns and raises as `to_megatron`; also UserError for a model without a Hugging Face format.
    """
    check_publishable(config)
    table = param_mappings(config, family)
    check_names(MEGATRON, megatron, [mapping.megatron for mapping in table])
    published: dict[str, Tensor] = {}
    for mapping in table:
        published |= mapping.to_hf(megatron[mapping.megatron], gradients)
    return published


def check_publishable(config: ModelConfig) -> None:
    """Refuse a model that the Hugging Face format does not cover.

    Raises: UserError naming the setting.
    """
    check_function(config)
    if _num_predictors(config) > 1:
        raise UserError(
            f"model.mtp_num_layers={config.mtp_num_layers} with a layer for each depth has no "
            "published form: Hugging Face checkpoints hold one multi-token prediction layer. Export a model "
            "with model.mtp_num_layers of 0 or 1, or with model.mtp_use_repeated_layer=true."
        )


def param_mappings(config: ModelConfig, family: Family = QWEN3_NEXT) -> list[ParamMapping]:
    """Return the mappings of all parameters of a model, in the order of the layers.

    megatron-core's HybridModel counts a mixer and its MoE as two layers: Hugging Face's layer i is megatron-core's
    layers 2i and 2i+1.
    """
    embedding, norm = (config.vocab_size, config.hidden_size), (config.hidden_size,)
    embedding_name = family.prefix + "embed_tokens.weight"
    table = [
        _same("embedding.word_embeddings.weight", embedding_name, embedding),
        _same("decoder.final_norm.weight", family.prefix + "norm.weight", norm),
        # our head is a tensor of its own, which starts as a copy of a tied embedding
        _same("output_layer.weight", embedding_name if family.tied_embeddings else HEAD, embedding),
    ]
    for i, mixer in enumerate(config.mixers):
        published = f"{family.prefix}layers.{i}."
        table += _layer(config, family, mixer, "decoder.", 2 * i, published)
    for depth in range(_num_predictors(config)):
        published = "mtp." if depth == 0 else f"mtp_deeper.{depth - 1}."
        table += _predictor(config, family, f"mtp.layers.{depth}.", published)
    return table


def _num_predictors(config: ModelConfig) -> int:
    return min(config.mtp_num_layers, 1) if config.mtp_use_repeated_layer else config.mtp_num_layers


def _predictor(config: ModelConfig, family: Family, m: str, h: str) -> list[ParamMapping]:
    """Return the mappings of one MTP depth. Here and below, m and h are megatron-core's and Hugging Face's prefixes."""
    hidden = config.hidden_size
    return [
        _same(m + "enorm.weight", h + "pre_fc_norm_embedding.weight", (hidden,)),
        _same(m + "hnorm.weight", h + "pre_fc_norm_hidden.weight", (hidden,)),
        _same(m + "eh_proj.weight", h + "fc.weight", (hidden, 2 * hidden)),
        *_layer(config, family, GATED_ATTENTION, m + "mtp_model_layer.", 0, h + "layers.0."),
        _same(m + "final_layernorm.weight", h + "norm.weight", (hidden,)),
    ]


def _layer(config: ModelConfig, family: Family, mixer: str, m: str, number: int, h: str) -> list[ParamMapping]:
    first, second, norm = f"{m}layers.{number}.", f"{m}layers.{number + 1}.", (config.hidden_size,)
    attention = first + "self_attention."
    return [
        _same(first + "input_layernorm.weight", h + "input_layernorm.weight", norm),
        *(_delta_net(config, family, attention, h) if mixer == GATED_DELTA_NET else _attention(config, attention, h)),
        _same(second + "pre_mlp_layernorm.weight", h + "post_attention_layernorm.weight", norm),
        *_moe(config, second + "mlp.", h + "mlp."),
    ]


def _delta_net(config: ModelConfig, family: Family, m: str, h: str) -> list[ParamMapping]:
    h += "linear_attn."
    values, heads = config.value_dim, config.linear_num_value_heads
    conv = (config.conv_dim, 1, config.linear_conv_kernel_dim)
    norm = (config.linear_value_head_dim,)
    return [
        *_delta_net_projections(config, family, m, h),
        _same(m + "conv1d.weight", h + "conv1d.weight", conv),
        _same(m + "A_log", h + "A_log", (heads,)),
        _same(m + "dt_bias", h + "dt_bias", (heads,)),
        _same(m + "out_norm.weight", h + "norm.weight", norm, shift=-1.0),
        _same(m + "out_proj.weight", h + "out_proj.weight", (config.hidden_size, values)),
    ]


def _delta_net_projections(config: ModelConfig, family: Family, m: str, h: str) -> list[ParamMapping]:
    keys, values, heads = config.key_dim, config.value_dim, config.linear_num_value_heads
    qkvz, beta_alpha = m + "in_proj.weight", m + "beta_alpha_proj.weight"
    if family.flat_projections:
        qkv = 2 * keys + values
        flat = {h + "in_proj_qkv.weight": qkv, h + "in_proj_z.weight": values}
        beta_alpha_flat = {h + "in_proj_b.weight": heads, h + "in_proj_a.weight": heads}
        return [
            _concatenated(qkvz, flat, config.hidden_size),
            _concatenated(beta_alpha, beta_alpha_flat, config.hidden_size),
        ]
    return [
        _by_key_head(qkvz, h + "in_proj_qkvz.weight", (keys, keys, values, values), config),
        _by_key_head(beta_alpha, h + "in_proj_ba.weight", (heads, heads), config),
    ]


def _attention(config: ModelConfig, m: str, h: str) -> list[ParamMapping]:
    h += "self_attn."
    hidden, head_dim = config.hidden_size, config.kv_channels
    query_dim, key_dim = config.num_attention_heads * head_dim, config.num_query_groups * head_dim
    gate_rows = config.gate_heads * config.gate_width
    query_rows = query_dim + (gate_rows if config.gate_is_in_query_projection else 0)
    separate_gate = _same(m + "linear_gate.weight", h + "gate_proj.weight", (gate_rows, hidden))
    return [
        ParamMapping(
            m + "linear_qkv.weight",
            (query_rows + 2 * key_dim, hidden),
            {
                h + "q_proj.weight": (query_rows, hidden),
                h + "k_proj.weight": (key_dim, hidden),
                h + "v_proj.weight": (key_dim, hidden),
            },
            partial(_join_qkv, config),
            partial(_split_qkv, config),
        ),
        _same(m + "q_layernorm.weight", h + "q_norm.weight", (head_dim,)),
        _same(m + "k_layernorm.weight", h + "k_norm.weight", (head_dim,)),
        _same(m + "linear_proj.weight", h + "o_proj.weight", (hidden, query_dim)),
        *([separate_gate] if gate_rows and not config.gate_is_in_query_projection else []),
    ]


def _moe(config: ModelConfig, m: str, h: str) -> list[ParamMapping]:
    hidden, num = config.hidden_size, config.num_moe_experts
    ffn, shared_ffn = config.moe_ffn_hidden_size, config.moe_shared_expert_intermediate_size
    prefixes = [f"{h}experts.{expert}." for expert in range(num)]
    shared_m, shared_h = m + "shared_experts.", h + "shared_expert."
    return [
        _same(m + "router.weight", h + "gate.weight", (num, hidden)),
        ParamMapping(
            m + "experts.linear_fc1.weight",
            (num, 2 * ffn, hidden),
            {name: (ffn, hidden) for expert in prefixes for name in _gate_up(expert)},
            partial(_stack, num),
            partial(_unstack, 2),
            stacked=h + "experts.gate_up_proj",
        ),
        ParamMapping(
            m + "experts.linear_fc2.weight",
            (num, hidden, ffn),
            {expert + "down_proj.weight": (hidden, ffn) for expert in prefixes},
            partial(_stack, num),
            partial(_unstack, 1),
            stacked=h + "experts.down_proj",
        ),
        _concatenated(shared_m + "linear_fc1.weight", dict.fromkeys(_gate_up(shared_h), shared_ffn), hidden),
        _same(shared_m + "linear_fc2.weight", shared_h + "down_proj.weight", (hidden, shared_ffn)),
        _same(shared_m + "gate_weight", h + "shared_expert_gate.weight", (1, hidden)),
    ]


def _gate_up(expert: str) -> list[str]:
    return [expert + "gate_proj.weight", expert + "up_proj.weight"]


def _same(megatron: str, hf: str, shape: Shape, shift: float = 0.0) -> ParamMapping:
    """Return a mapping between one tensor and one tensor, equal up to a shift."""
    return ParamMapping(megatron, shape, {hf: shape}, lambda one: one[0], lambda one: [one], shift)


def _concatenated(megatron: str, rows: dict[str, int], columns: int) -> ParamMapping:
    """Return a mapping to a concatenation of Hugging Face tensors with these numbers of rows."""
    return ParamMapping(
        megatron,
        (sum(rows.values()), columns),
        {name: (num, columns) for name, num in rows.items()},
        torch.cat,
        lambda tensor: list(tensor.split(list(rows.values()))),
    )


def _by_key_head(megatron: str, hf: str, rows: Shape, config: ModelConfig) -> ParamMapping:
    """Return a mapping between flat parts with these numbers of rows, and all parts grouped by key head (HF)."""
    heads = config.linear_num_key_heads
    shape = (sum(rows), config.hidden_size)
    widths = [num // heads for num in rows]

    def join(published: list[Tensor]) -> Tensor:
        parts = published[0].unflatten(0, (heads, -1)).split(widths, 1)
        return torch.cat([part.flatten(0, 1) for part in parts])

    def split(flat: Tensor) -> list[Tensor]:
        parts = [part.unflatten(0, (heads, -1)) for part in flat.split(rows)]
        return [torch.cat(parts, 1).flatten(0, 1)]

    return ParamMapping(megatron, shape, {hf: shape}, join, split)


def _join_qkv(config: ModelConfig, qkv: list[Tensor]) -> Tensor:
    """Fuse [per head query | gate], keys and values into linear_qkv: per KV head [queries | gates | key | value]."""
    groups, head_dim = config.num_query_groups, config.kv_channels
    heads_per_group = config.num_attention_heads // groups
    query, key, value = (x.unflatten(0, (groups, -1)) for x in qkv)
    query = query.unflatten(1, (heads_per_group, -1, head_dim)).transpose(1, 2).flatten(1, 3)
    return torch.cat((query, key, value), 1).flatten(0, 1)


def _split_qkv(config: ModelConfig, joined: Tensor) -> list[Tensor]:
    """Undo `_join_qkv`."""
    groups, head_dim = config.num_query_groups, config.kv_channels
    heads_per_group = config.num_attention_heads // groups
    by_group = joined.unflatten(0, (groups, -1))
    query_rows = by_group.shape[1] - 2 * head_dim
    query, key, value = by_group.split((query_rows, head_dim, head_dim), 1)
    query = query.unflatten(1, (-1, heads_per_group, head_dim)).transpose(1, 2).flatten(1, 3)
    return [x.flatten(0, 1) for x in (query, key, value)]


def _stack(num: int, published: list[Tensor]) -> Tensor:
    """Stack the experts' matrices, the parts of each in order. Shapes: returns [experts, rows of all parts, …]."""
    return torch.cat(published).unflatten(0, (num, -1))


def _unstack(parts: int, stacked: Tensor) -> list[Tensor]:
    """Undo `_stack` for experts of `parts` matrices."""
    return [part for expert in stacked for part in expert.chunk(parts)]
