"""Translation of our model section to Hugging Face's config.json, with every field that the released files have.

Fields are of three kinds: determined by the model; without effect on it, with the value of `like` or a default; and of
other programs, only in `like`. Readers differ in the fields they need: SGLang derives the layer types from
`full_attention_interval`, transformers and vLLM read `layer_types`, mlx-lm requires `intermediate_size`.
"""

from collections.abc import Mapping
from typing import Any

from megatron_q3n.config import GATED_ATTENTION, ModelConfig, UserError
from megatron_q3n.hf.families import QWEN3_NEXT, Family
from megatron_q3n.hf.model_config import FIXED, LAYER_TYPES, SHARED, text_section
from megatron_q3n.hf.model_mapping import check_publishable

# of `like`, replaced by the model's: the two formats of RoPE, layer types, multi-token prediction, and dtype
_REPLACED = {
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    *("layer_types", "full_attention_interval"),
    *("num_nextn_predict_layers", "mtp_num_hidden_layers"),
    *("dtype", "torch_dtype"),
}
# multimodal RoPE, which on text is the plain one
_MULTIMODAL_ROPE = ("mrope_section", "mrope_interleaved")


def to_published(
    model: ModelConfig,
    family: Family,
    like: Mapping[str, Any] | None = None,
    token_ids: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:
    """Return the content of config.json, without its dtype.

    like: a config.json whose values are used for fields that the model does not determine. token_ids: fields of the
    tokenizer, such as eos_token_id; None: those of `like`.
    Raises: UserError for a model that transformers does not support, or a `like` of another shape.
    """
    check_publishable(model)
    base = text_section(like)[0] if like else {}
    text = _text_published(model, family, base) | dict(token_ids or {})
    architecture = {"architectures": [family.architecture]}
    if not family.multimodal:
        return text | architecture
    if not like or "vision_config" not in like:
        raise UserError(
            f"{family.model_type} is a multimodal model, and its vision part is not in the checkpoint: give "
            "--like with the folder of a published model, or export the text model alone with "
            "--model-type qwen3_5_moe_text."
        )
    return {**_kept(like), **architecture, "tie_word_embeddings": False, "text_config": text}


def _text_published(model: ModelConfig, family: Family, base: Mapping[str, Any]) -> dict[str, Any]:
    types = {symbol: name for name, symbol in LAYER_TYPES.items()}
    return {
        **_defaults(model, family),
        **_kept(base),
        "model_type": "qwen3_5_moe_text" if family.multimodal else family.model_type,
        **{name: getattr(model, ours) for name, (ours, _) in SHARED.items()},
        "layer_types": [types[symbol] for symbol in model.mixers],
        **_interval(model.mixers),
        **_constants(family),
        **_rotary(model, family, base),
        **_mtp(model, family),
    }


def _kept(like: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of another config.json that hold for the export, without its quantization and the like."""
    return {
        name: value
        for name, value in like.items()
        if name not in _REPLACED and (name not in FIXED or value in FIXED[name])
    }


def _defaults(model: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the released fields that do not change the model's function, with the released values."""
    shared = {
        "attention_dropout": 0.0,
        "output_router_logits": False,
        "use_cache": True,
        # of dense MLPs, which no layer has; the released value is that of the selected experts together
        "intermediate_size": model.moe_ffn_hidden_size * model.moe_router_topk,
    }
    # the dtype of the DeltaNet states in vLLM and SGLang, as in training
    return shared if family is QWEN3_NEXT else shared | {"mamba_ssm_dtype": "float32"}


def _interval(mixers: str) -> dict[str, int]:
    """Return full_attention_interval, if attention layers are evenly spaced: SGLang knows no other models."""
    for interval in range(1, len(mixers) + 2):
        if all((mixer == GATED_ATTENTION) == (layer % interval == 0) for layer, mixer in enumerate(mixers, 1)):
            return {"full_attention_interval": interval}
    return {}


def _constants(family: Family) -> dict[str, Any]:
    """Return the fields with one value in our architecture that this family's config.json has."""
    constants: dict[str, Any] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "mlp_only_layers": [],
    }
    if family is not QWEN3_NEXT:
        return constants | {"attn_output_gate": True}
    return constants | {"norm_topk_prob": True, "decoder_sparse_step": 1, "use_sliding_window": False}


def _rotary(model: ModelConfig, family: Family, base: Mapping[str, Any]) -> dict[str, Any]:
    plain = {"rope_theta": model.rotary_base, "partial_rotary_factor": model.rotary_percent}
    if family is QWEN3_NEXT:
        return {"rope_scaling": None, **plain}
    published = base.get("rope_parameters") or base.get("rope_scaling") or {}
    multimodal = {name: published[name] for name in _MULTIMODAL_ROPE if name in published}
    section = multimodal.get("mrope_section")
    if section is not None and 2 * sum(section) != model.rotary_dim:
        raise UserError(
            f"--like: mrope_section={section} of its config.json rotates {2 * sum(section)} channels of a head, the "
            f"model {model.rotary_dim}; give --like with a model of the same head dimension, or none."
        )
    return {"rope_parameters": {"rope_type": "default", **plain, **multimodal}}


def _mtp(model: ModelConfig, family: Family) -> dict[str, Any]:
    if not model.mtp_num_layers:
        return {}
    if family is QWEN3_NEXT:
        return {"num_nextn_predict_layers": 1}
    return {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
