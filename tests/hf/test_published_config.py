"""Exported config.json: every released field, and nothing of `--like` that the run does not keep.

SGLang's and vLLM's configuration classes are not installed here; what they read is tested by its rule: SGLang computes
the layer types from `full_attention_interval`, vLLM and transformers read `layer_types`.
"""

from typing import Any

import pytest

from megatron_q3n.config import ModelConfig, UserError
from megatron_q3n.hf import QWEN3_5_MOE, QWEN3_5_MOE_TEXT, QWEN3_NEXT
from megatron_q3n.hf.model_config import from_published
from megatron_q3n.hf.published_config import to_published
from tests.hf.test_model_config import QWEN3_5_35B, QWEN3_NEXT_80B

SHARED_FIELDS = """
architectures attention_bias attention_dropout bos_token_id eos_token_id full_attention_interval head_dim hidden_act
hidden_size initializer_range intermediate_size linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads
linear_num_value_heads linear_value_head_dim max_position_embeddings mlp_only_layers model_type moe_intermediate_size
num_attention_heads num_experts num_experts_per_tok num_hidden_layers num_key_value_heads output_router_logits
rms_norm_eps router_aux_loss_coef shared_expert_intermediate_size tie_word_embeddings use_cache vocab_size
"""
RELEASED = {
    QWEN3_NEXT: "decoder_sparse_step norm_topk_prob partial_rotary_factor rope_scaling rope_theta use_sliding_window",
    QWEN3_5_MOE_TEXT: "attn_output_gate layer_types mamba_ssm_dtype mtp_num_hidden_layers mtp_use_dedicated_embeddings "
    "rope_parameters",
}
TOKEN_IDS = {"bos_token_id": None, "eos_token_id": 1}
# of the head dimension that the released Qwen3.5 models have
RELEASED_HEAD = {"kv_channels": 256, "rotary_percent": 0.25}


@pytest.mark.parametrize("family", RELEASED, ids=lambda f: f.model_type)
@pytest.mark.parametrize("with_like", [False, True])
def test_every_released_field_is_written(family: Any, with_like: bool) -> None:
    like = QWEN3_NEXT_80B | {"their_field": 3, "intermediate_size": 9} if with_like else None
    published = to_published(ModelConfig(), family, like, TOKEN_IDS)
    assert set((SHARED_FIELDS + RELEASED[family]).split()) - published.keys() == set()
    if like:
        assert published["their_field"] == 3
        assert published["intermediate_size"] == 9


def test_the_80b_is_written_as_released() -> None:
    imported, family = from_published(QWEN3_NEXT_80B, has_mtp=False)
    published = to_published(imported, family)
    assert {name: published.get(name) for name in QWEN3_NEXT_80B} == QWEN3_NEXT_80B


@pytest.mark.parametrize(
    ("pattern", "interval"), [("GGG*", 4), ("G*", 2), ("*", 1), ("G", 5), ("GGGG*", 5), ("*GGG", None), ("G**G", None)]
)
@pytest.mark.parametrize("with_like", [False, True])
def test_the_interval_gives_the_same_layers(pattern: str, interval: int | None, with_like: bool) -> None:
    """Where no interval does, there is none, whatever `like` has."""
    model = ModelConfig(mixer_pattern=pattern, num_layers=4 if len(pattern) != 5 else 10)
    published = to_published(model, QWEN3_NEXT, QWEN3_NEXT_80B if with_like else None)
    assert published.get("full_attention_interval") == interval
    if interval is not None:
        layers = range(1, model.num_layers + 1)
        kinds = ["linear_attention" if layer % interval else "full_attention" for layer in layers]
        assert published["layer_types"] == kinds


def test_multimodal_rope_is_kept() -> None:
    model = ModelConfig(**RELEASED_HEAD, rotary_base=5e5)
    published = to_published(model, QWEN3_5_MOE, QWEN3_5_35B)["text_config"]
    theirs = QWEN3_5_35B["text_config"]["rope_parameters"]
    assert published["rope_parameters"] == theirs | {"rope_theta": 5e5}
    with pytest.raises(UserError, match=r"mrope_section=\[11, 11, 10\].*rotates 64 channels of a head, the model 8"):
        to_published(ModelConfig(), QWEN3_5_MOE, QWEN3_5_35B)


@pytest.mark.parametrize("family", RELEASED, ids=lambda f: f.model_type)
def test_like_does_not_describe_the_run(family: Any) -> None:
    """Rotary positions in either format, quantized weights, and a predictor that the run does not have."""
    rope = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}
    like = {
        "model_type": "qwen3_next",
        "rope_parameters": rope,
        "rope_scaling": rope,
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "layer_types": ["full_attention"],
        "torch_dtype": "float16",
        "quantization_config": {"quant_method": "fp8"},
        "tie_word_embeddings": True,
        "norm_topk_prob": False,
        "num_nextn_predict_layers": 1,
        "mtp_num_hidden_layers": 1,
    }
    model = ModelConfig(rotary_base=5e5, rotary_percent=0.5, mtp_num_layers=0)
    assert to_published(model, family, like) == to_published(model, family)
    shell = {**like, "model_type": "qwen3_5_moe", "vision_config": {}}
    shell["text_config"] = like | {"model_type": "qwen3_5_moe_text"}
    outer = to_published(model, QWEN3_5_MOE, shell)
    assert outer.keys() & {"quantization_config", "torch_dtype"} == set()
    assert outer["tie_word_embeddings"] is False
    text = to_published(model, QWEN3_5_MOE_TEXT)
    del text["architectures"]
    assert outer["text_config"] == text
