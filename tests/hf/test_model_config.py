"""config.json and our model section: released models land on our recipes, what we is not supported is named.

That the numbers then mean the same is shown by tests/conversion/test_round_trip.py.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_q3n.config import ModelConfig, UserError
from megatron_q3n.hf import QWEN3_5_MOE, QWEN3_5_MOE_TEXT, QWEN3_NEXT, Family
from megatron_q3n.hf.model_config import family_of, from_published
from megatron_q3n.hf.published_config import to_published
from tests.model.reference.test_model import qwen3_next

RECIPES = Path(__file__).parent.parent.parent / "recipes" / "model"
# as released: what is left out there has transformers' default
QWEN3_NEXT_80B: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "norm_topk_prob": True,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "partial_rotary_factor": 0.25,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
QWEN3_5_35B: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "tie_word_embeddings": False,
    "text_config": {
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_5_moe_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    },
    "vision_config": {"depth": 27},
}


@pytest.mark.parametrize(
    ("published", "family", "recipe"),
    [(QWEN3_NEXT_80B, QWEN3_NEXT, "80b_a3b"), (QWEN3_5_35B, QWEN3_5_MOE, "qwen3_5_35b_a3b")],
    ids=["80b", "35b"],
)
def test_a_released_model_lands_on_its_recipe(published: dict[str, Any], family: Family, recipe: str) -> None:
    """So that `checkpoint.load=…` is the one override that continued pretraining takes."""
    section = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    ours = ModelConfig(**section)
    imported, found = from_published(published, has_mtp=True)
    assert found is family
    free = {"name", "max_position_embeddings"}
    assert imported.model_dump(exclude=free) == ours.model_dump(exclude=free)
    assert from_published(published, has_mtp=False)[0].mtp_num_layers == 0


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from([QWEN3_NEXT, QWEN3_5_MOE_TEXT]),
    pattern=st.sampled_from(["GGG*", "G*", "*G", "G", "*", "GG*"]),
    repeats=st.integers(1, 4),
    heads=st.integers(1, 3),
    rotary=st.sampled_from([(32, 0.25), (32, 0.5), (16, 1.0)]),
    mtp=st.integers(0, 1),
)
def test_there_and_back_is_the_same_model(
    family: Family, pattern: str, repeats: int, heads: int, rotary: tuple[int, float], mtp: int
) -> None:
    model = ModelConfig(
        name="imported",
        mixer_pattern=pattern,
        num_layers=repeats * len(pattern),
        num_attention_heads=2 * heads,
        kv_channels=rotary[0],
        rotary_percent=rotary[1],
        rotary_base=5e5,
        linear_num_key_heads=heads,
        linear_num_value_heads=2 * heads,
        mtp_num_layers=mtp,
    )
    published = to_published(model, family)
    assert from_published(published, has_mtp=bool(mtp)) == (model, family)


@pytest.mark.parametrize("family", [QWEN3_NEXT, QWEN3_5_MOE_TEXT], ids=lambda f: f.model_type)
def test_transformers_reads_it_as_meant(family: Family) -> None:
    """Every field of theirs that we set, rotary positions in their own spelling included."""
    qwen3_next()
    from transformers import AutoConfig

    model = ModelConfig(rotary_base=5e5, rotary_percent=0.5, mixer_pattern="G*")
    published = to_published(model, family)
    kind = published.pop("model_type")
    theirs = AutoConfig.for_model(kind, **published)
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert theirs.rope_parameters["partial_rotary_factor"] == 0.5
    assert theirs.layer_types == ["linear_attention", "full_attention"] * 2
    for name in published.keys() - {"rope_parameters", "rope_scaling", "rope_theta"}:
        assert getattr(theirs, name) == published[name], name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tie_word_embeddings", 2),
        ("num_hidden_layers", 10**9),
        ("num_experts", 10**9),
        ("hidden_size", 10**400),
        ("hidden_size", "2048"),
        ("hidden_size", True),
        ("hidden_size", 2048.5),
        ("hidden_size", None),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", float("inf")),
        ("rope_theta", "1e7"),
        ("full_attention_interval", 0),
        ("full_attention_interval", "4"),
        ("layer_types", [1, 2]),
        ("layer_types", [["full_attention"]]),
        ("layer_types", "full_attention"),
        ("rope_parameters", "default"),
        ("rope_parameters", ["default"]),
        ("norm_topk_prob", False),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("decoder_sparse_step", 2),
        ("mlp_only_layers", [0]),
        ("layer_types", ["sliding_attention"] * 48),
        ("layer_types", ["full_attention"] * 3),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_what_we_cannot_represent_is_named(field: str, value: object) -> None:
    name = "rope_parameters" if field == "rope_scaling" else field
    with pytest.raises(UserError, match=rf"config\.json: {name}=.*is not supported"):
        from_published(QWEN3_NEXT_80B | {field: value}, has_mtp=True)


def test_a_missing_interval_is_that_of_transformers() -> None:
    """Null too, as other programs write it."""
    expected, _ = from_published(QWEN3_NEXT_80B, has_mtp=True)
    without = {name: value for name, value in QWEN3_NEXT_80B.items() if name != "full_attention_interval"}
    assert from_published(without, has_mtp=True)[0] == expected
    assert from_published(without | {"full_attention_interval": None}, has_mtp=True)[0] == expected
    assert from_published(without | {"full_attention_interval": 2}, has_mtp=True)[0].mixer_pattern == "G*"


@pytest.mark.parametrize(
    ("published", "message"),
    [
        ({"model_type": ["qwen3_next"]}, r"model_type=\['qwen3_next'\] is not supported"),
        ({"model_type": "qwen3_5_moe", "text_config": ["a"]}, r"text_config=\['a'\] is not supported"),
        (
            {"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_text"}},
            r"text_config\.model_type=qwen3_5_text is not supported; supported is only 'qwen3_5_moe_text'",
        ),
    ],
)
def test_another_structure_is_refused(published: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_published(published, has_mtp=False)


def test_a_refused_setting_has_its_published_name() -> None:
    with pytest.raises(UserError, match=r"partial_rotary_factor: Input should be less than or equal to 1"):
        from_published(QWEN3_NEXT_80B | {"partial_rotary_factor": 3.0}, has_mtp=True)
    with pytest.raises(UserError, match=r"linear_conv_kernel_dim: Input should be greater than 1"):
        from_published(QWEN3_NEXT_80B | {"linear_conv_kernel_dim": 1}, has_mtp=True)
    with pytest.raises(UserError, match=r"rms_norm_eps: Input should be greater than 0"):
        from_published(QWEN3_NEXT_80B | {"rms_norm_eps": -1}, has_mtp=True)


def test_impossible_sizes_are_refused_with_our_reason() -> None:
    with pytest.raises(UserError, match=r"num_attention_heads=15 is not divisible by"):
        from_published(QWEN3_NEXT_80B | {"num_attention_heads": 15}, has_mtp=True)


def test_unknown_models_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"model_type='llama' is not supported"):
        from_published({"model_type": "llama"}, has_mtp=False)
    with pytest.raises(UserError, match=r"Did you mean 'qwen3_next'"):
        family_of("qwen3next", None)
    assert family_of(None, None) is QWEN3_NEXT
