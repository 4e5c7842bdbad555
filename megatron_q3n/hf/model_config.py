"""Translation of Hugging Face's config.json to our model section; unsupported fields are refused by name.

A field that config.json omits has the default of transformers. Settings of training or inference only (dropout, token
ids, caches) are ignored. RoPE has two formats: `rope_theta` and `rope_scaling`, or both in `rope_parameters`.
Multimodal RoPE (mrope) equals plain RoPE on text.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from megatron_q3n.config import GATED_ATTENTION, GATED_DELTA_NET, ModelConfig, UserError, suggest
from megatron_q3n.hf.families import FAMILIES, QWEN3_5_MOE_TEXT, QWEN3_NEXT, Family
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
# fields with these values only in our architecture, the first unless given; a checkpoint with another is refused
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attn_output_gate": (True,),
    "tie_word_embeddings": (False, True),
    "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": (None, []),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "mtp_use_dedicated_embeddings": (False,),
}
_PLAIN_ROPE = ("default", None)
# far above every model, and small enough to list the parameters of each layer and expert
MAX_LAYERS, MAX_EXPERTS = 1000, 8192
MAX_SIZE, MAX_NUMBER = 2**31 - 1, 1e30


def from_published(published: Mapping[str, Any], *, has_mtp: bool) -> tuple[ModelConfig, Family]:
    """Translate the content of config.json; the family tells whether embedding and head are one tensor.

    has_mtp: whether the weights have a multi-token prediction layer; no field of config.json is reliable.
    Raises: UserError naming the field that our model does not support.
    """
    text, family = text_section(published)
    for name, allowed in FIXED.items():
        for section in (published, text):
            if section.get(name, allowed[0]) not in allowed:
                _refuse(name, section[name], f"only {allowed[0]!r}")
    settings = {ours: _value(text, name, family) for name, (ours, _) in SHARED.items()}
    _check_sizes(text, settings)
    settings |= _rotary(text) | {
        "mixer_pattern": _pattern(_layer_types(text, settings["num_layers"])),
        "mtp_num_layers": int(has_mtp),
    }
    try:
        model = ModelConfig(name="imported", **settings)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise UserError(f"config.json describes a model that cannot be built: {problems}") from None
    return model, replace(family, tied_embeddings=True) if _is_tied(published, text, family) else family


def family_of(model_type: str | None, like: Path | None) -> Family:
    """Return the family to export to: of `model_type`, else of the model folder `like`, else Qwen3-Next.

    Raises: UserError for an unknown model_type.
    """
    if model_type is not None:
        return text_section({"model_type": model_type})[1]
    return text_section(read_json(like / CONFIG))[1] if like else QWEN3_NEXT


def text_section(published: Mapping[str, Any]) -> tuple[Mapping[str, Any], Family]:
    """Return the text model's part of config.json, and its family.

    Raises: UserError for an unknown model_type.
    """
    known = {family.model_type: family for family in FAMILIES}
    family = known[_model_type(published, known)]
    if not family.multimodal:
        return published, family
    text = published.get("text_config")
    if text is None:
        return {}, family
    if not isinstance(text, Mapping):
        _refuse("text_config", text, "a JSON object")
    if text.get("model_type", QWEN3_5_MOE_TEXT.model_type) != QWEN3_5_MOE_TEXT.model_type:
        _refuse("text_config.model_type", text["model_type"], f"only {QWEN3_5_MOE_TEXT.model_type!r}")
    return text, family


def _model_type(published: Mapping[str, Any], known: Mapping[str, Family]) -> str:
    model_type = published.get("model_type")
    if isinstance(model_type, str) and model_type in known:
        return model_type
    raise UserError(
        f"config.json: model_type={model_type!r} is not supported; it can be one of "
        f"{', '.join(known)}.{suggest(str(model_type), known)}"
    )


def _value(text: Mapping[str, Any], name: str, family: Family) -> Any:
    """Return a number of config.json, or its default."""
    ours, default = SHARED[name]
    value = text.get(name, default[family is not QWEN3_NEXT] if isinstance(default, tuple) else default)
    if ModelConfig.model_fields[ours].annotation is int:
        return _whole_number(name, value, MAX_SIZE)
    return _number(name, value)


def _whole_number(name: str, value: Any, maximum: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
        _refuse(name, value, f"a whole number from 1 to {maximum}")
    return value


def _number(name: str, value: Any) -> float:
    """Return a number that is neither infinite nor NaN; its range is the setting's."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < MAX_NUMBER:
        _refuse(name, value, f"a number below {MAX_NUMBER:g}")
    return value


def _check_sizes(text: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse numbers of layers and experts that no model has: their parameters are listed one by one."""
    for name, maximum in (("num_hidden_layers", MAX_LAYERS), ("num_experts", MAX_EXPERTS)):
        _whole_number(name, settings[SHARED[name][0]], maximum)


def _describe(problem: Any) -> str:
    """Return a problem of pydantic with the name of the field in config.json."""
    published = {ours: name for name, (ours, _) in SHARED.items()}
    published |= {"rotary_base": "rope_theta", "rotary_percent": "partial_rotary_factor"}
    names = [published.get(str(part), str(part)) for part in problem["loc"]]
    return f"{'.'.join(names)}: {problem['msg']}" if names else problem["msg"]


def _is_tied(published: Mapping[str, Any], text: Mapping[str, Any], family: Family) -> bool:
    """Return whether the head is the embedding; for a multimodal model, the outer field decides in transformers."""
    own = text.get("tie_word_embeddings", False)
    return published.get("tie_word_embeddings", own) if family.multimodal else own


def _layer_types(text: Mapping[str, Any], num_layers: int) -> str:
    names = text.get("layer_types")
    if names is None:
        interval = text.get("full_attention_interval")
        interval = 4 if interval is None else _whole_number("full_attention_interval", interval, MAX_SIZE)
        return "".join(GATED_DELTA_NET if (layer + 1) % interval else GATED_ATTENTION for layer in range(num_layers))
    if not isinstance(names, list):
        _refuse("layer_types", names, f"a list of {sorted(LAYER_TYPES)}")
    if unknown := [name for name in names if not isinstance(name, str) or name not in LAYER_TYPES]:
        _refuse("layer_types", unknown[:3], f"only {sorted(LAYER_TYPES)}")
    if len(names) != num_layers:
        _refuse("layer_types", f"{len(names)} entries", f"num_hidden_layers={num_layers} of them")
    return "".join(LAYER_TYPES[name] for name in names)


def _pattern(mixers: str) -> str:
    """Return the shortest pattern that, repeated, gives these mixers."""
    lengths = (n for n in range(1, len(mixers) + 1) if len(mixers) % n == 0)
    return next(mixers[:n] for n in lengths if mixers[:n] * (len(mixers) // n) == mixers)


def _rotary(text: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        section = text.get(name)
        if section is not None and not isinstance(section, Mapping):
            _refuse(name, section, "a JSON object, or null")
        rope |= section or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in _PLAIN_ROPE:
        _refuse("rope_parameters", f"rope_type {kind!r}", "only 'default'")
    base = rope.get("rope_theta", text.get("rope_theta", 10000.0))
    factor = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 0.25))
    return {"rotary_base": _number("rope_theta", base), "rotary_percent": _number("partial_rotary_factor", factor)}


def _refuse(name: str, found: Any, allowed: str) -> NoReturn:
    shown = str(found)
    raise UserError(
        f"config.json: {name}={shown if len(shown) <= 100 else shown[:100] + '…'} is not supported; supported is "
        f"{allowed}."
    )
