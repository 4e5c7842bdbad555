"""Settings that change a model's function: all classified, and none exported that the format cannot describe."""

import dataclasses
from typing import Any

import pytest

from megatron_q3n.config import ModelConfig, UserError, validate
from megatron_q3n.config.megatron_fields import TYPED_SETTINGS, transformer_config_fields
from megatron_q3n.hf import FAMILIES, QWEN3_5_MOE_TEXT, QWEN3_NEXT
from megatron_q3n.hf.function_settings import (
    DESCRIBED,
    IMPLIED,
    MEGATRON_IMPLIED,
    MEGATRON_WITHOUT_EFFECT,
    WITHOUT_EFFECT,
    check_function,
)
from megatron_q3n.hf.published_config import to_published

# a value of each field that builds or trains another model
OTHER_FUNCTION: dict[str, Any] = {
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_pre_softmax": True,
    "moe_router_score_function": "sigmoid",
    "rotary_interleaved": True,
    "softmax_scale": 0.5,
    "softmax_type": "off-by-one",
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "qk_layernorm": False,
    "moe_shared_expert_gate": False,
    "no_rope_freq": 2,
    "moe_apply_probs_on_input": True,
    "moe_expert_capacity_factor": 1.0,
    "activation_func_clamp_value": 7.0,
    "glu_linear_offset": 1.0,
    "apply_residual_connection_post_layernorm": True,
}


def test_every_field_of_megatron_core_is_classified_once() -> None:
    """A field that a new megatron-core adds has to be classified before its exports can be trusted."""
    from megatron.core.transformer import TransformerConfig

    groups = [set(TYPED_SETTINGS), set(MEGATRON_IMPLIED), *MEGATRON_WITHOUT_EFFECT.values()]
    classified = [name for group in groups for name in group]
    assert len(classified) == len(set(classified)), "classified twice"
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    # the pass-through refuses functions
    settable = {name for name in fields if "Callable" not in transformer_config_fields()[name]}
    assert settable - set(classified) == set(), "not classified"
    assert set(classified) - fields == set(), "no longer fields"


def test_every_model_setting_is_classified_once() -> None:
    groups = [DESCRIBED, set(IMPLIED), WITHOUT_EFFECT, {"megatron"}]
    classified = [name for group in groups for name in group]
    assert sorted(classified) == sorted(ModelConfig.model_fields)


def test_the_implied_values_are_those_of_the_built_model() -> None:
    from megatron_q3n.model.transformer_config import transformer_config

    built = transformer_config(validate({"model": {}}), "torch")
    for name, (implied, *_) in MEGATRON_IMPLIED.items():
        assert getattr(built, name) == implied, name


@pytest.mark.parametrize("family", [QWEN3_NEXT, QWEN3_5_MOE_TEXT], ids=lambda f: f.model_type)
def test_the_described_settings_are_in_config_json(family: Any) -> None:
    """Each changes config.json when it is changed alone, but for the layer that shares its weights over MTP depths."""
    other = {
        "mixer_pattern": "G",
        "num_layers": 8,
        "rotary_percent": 0.5,
        "mtp_num_layers": 0,
        "moe_aux_loss_coeff": 0.5,
        "layernorm_epsilon": 1e-5,
        "init_method_std": 0.5,
    }
    default = ModelConfig()
    published = to_published(default, family)
    for name in DESCRIBED - {"mtp_use_repeated_layer"}:
        changed = other.get(name, 2 * getattr(default, name))
        assert to_published(default.model_copy(update={name: changed}), family) != published, name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.model_type)
def test_another_function_is_not_exported(family: Any) -> None:
    for name, value in OTHER_FUNCTION.items():
        # some are refused by validation already, since they cannot work here at all
        with pytest.raises(UserError, match=rf"model\.megatron\.{name}={value}(:| cannot be exported)"):
            to_published(validate({"model": {"megatron": {name: value}}}).model, family)


def test_an_unclassified_setting_is_not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a field that a new megatron-core adds, or a model setting that was forgotten."""
    monkeypatch.delitem(MEGATRON_IMPLIED, "softmax_scale")
    monkeypatch.delitem(IMPLIED, "attention_gate")
    with pytest.raises(UserError, match=r"softmax_scale=0\.5 cannot be exported.*megatron-core's default"):
        check_function(ModelConfig(megatron={"softmax_scale": 0.5}))
    with pytest.raises(UserError, match=r"model\.attention_gate=none cannot be exported"):
        check_function(ModelConfig(attention_gate="none"))


def test_settings_of_training_are_exported() -> None:
    harmless = {"moe_router_topk_scaling_factor": 1.0, "hidden_dropout": 0.1, "fp8_margin": 2, "softmax_scale": None}
    check_function(ModelConfig(megatron=harmless, moe_z_loss_coeff=0.1, name="mine"))


@pytest.mark.parametrize("family", [QWEN3_NEXT, QWEN3_5_MOE_TEXT], ids=lambda f: f.model_type)
def test_like_does_not_promise_an_mtp_layer_that_the_run_lacks(family: Any) -> None:
    like = to_published(ModelConfig(mtp_num_layers=1), family) | {"eos_token_id": 7}
    without = to_published(ModelConfig(mtp_num_layers=0), family, like)
    assert not [name for name in without if "nextn" in name or name == "mtp_num_hidden_layers"]
    assert without["eos_token_id"] == 7
