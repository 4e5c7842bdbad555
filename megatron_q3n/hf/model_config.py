"""Translation between Hugging Face's config.json and our model section; unsupported fields are refused by name.

A field that config.json omits has the default of transformers. Settings of training or inference only (dropout, token
ids, caches) are ignored. RoPE has two formats: `rope_theta` and `rope_scaling`, or both in `rope_parameters`.
Multimodal RoPE (mrope) equals plain RoPE on text.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_q3n.config import GATED_ATTENTION, GATED_DELTA_NET, ModelConfig, UserError, suggest
from megatron_q3n.hf.families import FAMILIES, QWEN3_NEXT, Family
from megatron_q3n.hf.model_mapping import check_publishable
from megatron_q3n.hf.weights import CONFIG, read_json

LAYER_TYPES = {"linear_attention": GATED_DELTA_NET, "full_attention": GATED_ATTENTION}

# Hugging Face field -> (our field, transformers' default: of all families, or of Qwen3-Next and of Qwen3.5)
_SHARED: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", (151936, 248320)),
    "hidden_size": ("hidden_size", 2048),
    "num_hidden_layers": ("num_layers", (48, 40)),
    "max_position_embeddings": ("max_position_embeddings", 32768),
    "initializer_range": ("init_method_std", 0.02),
    "rms_norm_eps": ("layernorm_epsilon", 1e-6),
    "num_attention_heads": ("num_attention_heads", 16),
    "num_key_value_heads": ("num_query_groups", 2),
    "head_dim": ("kv_channels", 256),
    "linear_num_key_heads": ("linear_num_key_heads", 16),
    "linear_num_value_heads": ("linear_num_value_heads", 32),
    "linear_key_head_dim": ("linear_key_head_dim", 128),
    "linear_value_head_dim": ("linear_value_head_dim", 128),
    "linear_conv_kernel_dim": ("linear_conv_kernel_dim", 4),
    "num_experts": ("num_moe_experts", (512, 256)),
    "num_experts_per_tok": ("moe_router_topk", (10, 8)),
    "moe_intermediate_size": ("moe_ffn_hidden_size", 512),
    "shared_expert_intermediate_size": ("moe_shared_expert_intermediate_size", 512),
    "router_aux_loss_coef": ("moe_aux_loss_coeff", 0.001),
}
# fields that have one value in our architecture; a checkpoint with another value is refused
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attn_output_gate": (True,),
    "tie_word_embeddings": (False,),
    "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": (None, []),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "mtp_use_dedicated_embeddings": (False,),
}
_PLAIN_ROPE = ("default", None)
# fields that announce a multi-token prediction layer, of all families
_MTP_FIELDS = {"num_nextn_predict_layers", "mtp_num_hidden_layers"}


def from_published(published: Mapping[str, Any], *, has_mtp: bool) -> tuple[ModelConfig, Family]:
    """Translate the content of config.json.

    has_mtp: whether the weights have a multi-token prediction layer; no field of config.json is reliable.
    Raises: UserError naming the field that our model does not support.
    """
    text, family = _text_section(published)
    for name, allowed in _FIXED.items():
        for section in (published, text):
            if section.get(name, allowed[0]) not in allowed:
                _refuse(name, section[name], f"only {allowed[0]!r}")
    settings = {ours: _value(text, name, family) for name, (ours, _) in _SHARED.items()}
    settings |= _rotary(text) | {
        "mixer_pattern": _pattern(_layer_types(text, settings["num_layers"])),
        "mtp_num_layers": int(has_mtp),
    }
    try:
        return ModelConfig(name="imported", **settings), family
    except ValidationError as error:
        problems = "; ".join(problem["msg"] for problem in error.errors())
        raise UserError(f"config.json describes a model that cannot be built: {problems}") from None


def family_of(model_type: str | None, like: Path | None) -> Family:
    """Return the family to export to: of `model_type`, else of the model folder `like`, else Qwen3-Next.

    Raises: UserError for an unknown model_type.
    """
    if model_type is not None:
        return _text_section({"model_type": model_type})[1]
    return _text_section(read_json(like / CONFIG))[1] if like else QWEN3_NEXT


def to_published(model: ModelConfig, family: Family, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the content of config.json.

    like: a config.json whose values are used for fields that the model does not determine, e.g. token ids.
    Raises: UserError for a model that transformers does not support.
    """
    check_publishable(model)
    if not family.multimodal:
        base = _text_section(like)[0] if like else {}
        return {**_text_published(model, family, base), "architectures": [family.architecture]}
    if not like or "vision_config" not in like:
        raise UserError(
            f"{family.model_type} is a multimodal model, and its vision part is not in the checkpoint: give "
            "--like with the folder of a published model, or export the text model alone with "
            "--model-type qwen3_5_moe_text."
        )
    text = _text_published(model, family, _text_section(like)[0])
    return {**like, "architectures": [family.architecture], "text_config": text}


def _text_published(model: ModelConfig, family: Family, base: Mapping[str, Any]) -> dict[str, Any]:
    types = {symbol: name for name, symbol in LAYER_TYPES.items()}
    replaced = {"full_attention_interval", "rope_theta", "rope_scaling", "partial_rotary_factor"} | _MTP_FIELDS
    return {
        **{name: value for name, value in base.items() if name not in replaced},
        "model_type": "qwen3_5_moe_text" if family.multimodal else family.model_type,
        **{name: getattr(model, ours) for name, (ours, _) in _SHARED.items()},
        "layer_types": [types[symbol] for symbol in model.mixers],
        **_published_constants(family),
        **_published_rotary(model, family),
        **_published_mtp(model, family),
    }


def _text_section(published: Mapping[str, Any]) -> tuple[Mapping[str, Any], Family]:
    model_type = published.get("model_type")
    known = {family.model_type: family for family in FAMILIES}
    if model_type not in known:
        raise UserError(
            f"config.json: model_type={model_type!r} is not supported; it can be one of "
            f"{', '.join(known)}.{suggest(str(model_type), known)}"
        )
    family = known[model_type]
    return (published.get("text_config") or {}) if family.multimodal else published, family


def _value(text: Mapping[str, Any], name: str, family: Family) -> Any:
    default = _SHARED[name][1]
    return text.get(name, default[family is not QWEN3_NEXT] if isinstance(default, tuple) else default)


def _layer_types(text: Mapping[str, Any], num_layers: int) -> str:
    names = text.get("layer_types")
    if names is None:
        interval = text.get("full_attention_interval", 4)
        return "".join(GATED_DELTA_NET if (layer + 1) % interval else GATED_ATTENTION for layer in range(num_layers))
    if unknown := sorted(set(names) - set(LAYER_TYPES)):
        _refuse("layer_types", unknown, f"only {sorted(LAYER_TYPES)}")
    if len(names) != num_layers:
        _refuse("layer_types", f"{len(names)} entries", f"num_hidden_layers={num_layers} of them")
    return "".join(LAYER_TYPES[name] for name in names)


def _pattern(mixers: str) -> str:
    """Return the shortest pattern that, repeated, gives these mixers."""
    lengths = (n for n in range(1, len(mixers) + 1) if len(mixers) % n == 0)
    return next(mixers[:n] for n in lengths if mixers[:n] * (len(mixers) // n) == mixers)


def _rotary(text: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(text.get("rope_scaling") or {}) | dict(text.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in _PLAIN_ROPE:
        _refuse("rope_parameters", f"rope_type {kind!r}", "only 'default'")
    factor = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 0.25))
    return {"rotary_base": rope.get("rope_theta", text.get("rope_theta", 10000.0)), "rotary_percent": factor}


def _published_constants(family: Family) -> dict[str, Any]:
    """Return the fields of `_FIXED` that this family's config.json has."""
    constants: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False}
    if family is not QWEN3_NEXT:
        return constants | {"attn_output_gate": True}
    return constants | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _published_rotary(model: ModelConfig, family: Family) -> dict[str, Any]:
    plain = {"rope_theta": model.rotary_base, "partial_rotary_factor": model.rotary_percent}
    if family is not QWEN3_NEXT:
        return {"rope_parameters": {"rope_type": "default", **plain}}
    return {"rope_scaling": None, **plain}


def _published_mtp(model: ModelConfig, family: Family) -> dict[str, Any]:
    if not model.mtp_num_layers:
        return {}
    name = "mtp_num_hidden_layers" if family is not QWEN3_NEXT else "num_nextn_predict_layers"
    return {name: 1}


def _refuse(name: str, found: Any, allowed: str) -> None:
    raise UserError(f"config.json: {name}={found} is not supported; supported is {allowed}.")
