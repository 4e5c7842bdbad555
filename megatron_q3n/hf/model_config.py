"""Translation of Hugging Face's config.json to our model section; unsupported fields are refused by name.

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
from megatron_q3n.hf.weights import CONFIG, read_json

LAYER_TYPES = {"linear_attention": GATED_DELTA_NET, "full_attention": GATED_ATTENTION}

# Hugging Face field -> (our field, transformers' default: of all families, or of Qwen3-Next and of Qwen3.5)
SHARED: dict[str, tuple[str, Any]] = {
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
FIXED: dict[str, tuple[Any, ...]] = {
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


def from_published(published: Mapping[str, Any], *, has_mtp: bool) -> tuple[ModelConfig, Family]:
    """Translate the content of config.json.

    has_mtp: whether the weights have a multi-token prediction layer; no field of config.json is reliable.
    Raises: UserError naming the field that our model does not support.
    """
    text, family = text_section(published)
    for name, allowed in FIXED.items():
        for section in (published, text):
            if section.get(name, allowed[0]) not in allowed:
                _refuse(name, section[name], f"only {allowed[0]!r}")
    settings = {ours: _value(text, name, family) for name, (ours, _) in SHARED.items()}
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
        return text_section({"model_type": model_type})[1]
    return text_section(read_json(like / CONFIG))[1] if like else QWEN3_NEXT


def text_section(published: Mapping[str, Any]) -> tuple[Mapping[str, Any], Family]:
    """Return the text model's part of config.json, and its family."""
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
    default = SHARED[name][1]
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


def _refuse(name: str, found: Any, allowed: str) -> None:
    raise UserError(f"config.json: {name}={found} is not supported; supported is {allowed}.")
