"""Parameter counts and FLOPs against the published figures, against transformers' own model, and by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3NextConfig

from megatron_q3n.config import ModelConfig
from megatron_q3n.config.sizes import flops_per_token, mtp_weights, parameters, pipeline_segments, trunk_weights

QWEN3_NEXT_80B = ModelConfig(
    vocab_size=151936,
    hidden_size=2048,
    num_layers=48,
    num_attention_heads=16,
    num_query_groups=2,
    kv_channels=256,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    num_moe_experts=512,
    moe_router_topk=10,
    moe_ffn_hidden_size=512,
    moe_shared_expert_intermediate_size=512,
)


def test_released_model_has_its_published_size() -> None:
    count = parameters(QWEN3_NEXT_80B)
    assert count.total / 1e9 == pytest.approx(79.67, abs=0.005)
    assert count.mtp / 1e9 == pytest.approx(1.65, abs=0.005)
    assert count.active / 1e9 == pytest.approx(3.25, abs=0.005)
    assert count.active_with_embeddings / 1e9 == pytest.approx(3.87, abs=0.006)


@pytest.mark.parametrize("model", [QWEN3_NEXT_80B, ModelConfig()], ids=["80b_a3b", "tiny"])
def test_transformers_model_has_as_many_parameters(model: ModelConfig) -> None:
    """MTP is not covered: transformers has none."""
    # late: two seconds of model code that the other tests here need not wait for
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextForCausalLM

    with torch.device("meta"):
        theirs = Qwen3NextForCausalLM(_transformers_config(model))
    assert parameters(model).total == sum(p.numel() for p in theirs.parameters())


def test_groups_add_up_to_the_tensors() -> None:
    model = ModelConfig(mtp_num_layers=2)
    count = parameters(model)
    tensors = trunk_weights(model) + mtp_weights(model)
    assert count.total_with_mtp == sum(weight.count for weight in tensors)
    assert count.total_with_mtp == count.total + count.mtp
    assert min(count.groups.values()) > 0


def test_a_repeated_mtp_layer_is_held_once() -> None:
    one = parameters(ModelConfig(mtp_num_layers=1)).mtp
    assert parameters(ModelConfig(mtp_num_layers=3)).mtp == 3 * one
    assert parameters(ModelConfig(mtp_num_layers=3, mtp_use_repeated_layer=True)).mtp == one
    assert parameters(ModelConfig(mtp_num_layers=0)).mtp == 0


@pytest.mark.parametrize(
    ("sequence_length", "with_mtp", "giga"),
    [(4096, False, 23.0), (4096, True, 25.4), (32768, True, 34.6), (262144, True, 107.9)],
)
def test_released_model_costs_its_published_flops(sequence_length: int, with_mtp: bool, giga: float) -> None:
    flops = flops_per_token(QWEN3_NEXT_80B, sequence_length, with_mtp=with_mtp)
    assert flops.total / 1e9 == pytest.approx(giga, abs=0.05)


@pytest.mark.parametrize(("sequence_length", "share"), [(4096, 0.05), (32768, 0.31), (262144, 0.78)])
def test_attention_takes_its_published_share_of_flops(sequence_length: int, share: float) -> None:
    flops = flops_per_token(QWEN3_NEXT_80B, sequence_length, with_mtp=False)
    assert flops.attention_core / flops.total == pytest.approx(share, abs=0.005)


def test_flops_of_a_tiny_model_by_hand() -> None:
    """Forward, 3 Gated DeltaNet layers and 1 of attention, hidden 128, every number written out."""
    flops = flops_per_token(ModelConfig(), 256, training=False)
    gated_delta_net = 128 * (64 + 64 + 128 + 128) + 128 * 16 + 256 * 4 + 128 * 128
    attention = 128 * (128 + 128 + 64 + 64) + 128 * 128
    experts, shared, router = 2 * 3 * 128 * 64, 3 * 128 * 64 + 128, 128 * 8
    assert flops.projections == 2 * (3 * gated_delta_net + attention)
    assert flops.delta_rule == 3 * 8 * (8 * 16 * 16)
    assert flops.attention_core == 4 * 4 * 32 * 256 / 2
    assert flops.routed_experts == 4 * 2 * experts
    assert flops.shared_expert == 4 * 2 * shared
    assert flops.router == 4 * 2 * router
    assert flops.head == 2 * 128 * 512
    layer = attention + experts + shared + router
    assert flops.mtp == 2 * (128 * 256 + layer + 128 * 512) + flops.attention_core


def test_training_is_three_forward_passes_and_mtp_depths_add_up() -> None:
    model = ModelConfig(mtp_num_layers=2)
    forward = flops_per_token(model, 256, training=False)
    assert flops_per_token(model, 256).total == 3 * forward.total
    assert forward.mtp == 2 * flops_per_token(ModelConfig(), 256, training=False).mtp


@given(layers=st.integers(1, 12), segments=st.integers(1, 8))
def test_pipeline_segments_are_even_and_lose_nothing(layers: int, segments: int) -> None:
    model = ModelConfig(num_layers=4 * layers)
    cut = pipeline_segments(model, segments)
    sizes = [len(segment) for segment in cut]
    assert "".join(cut) == model.main_pattern
    assert len(cut) == segments
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def _transformers_config(model: ModelConfig) -> Qwen3NextConfig:
    return Qwen3NextConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.kv_channels,
        linear_num_key_heads=model.linear_num_key_heads,
        linear_num_value_heads=model.linear_num_value_heads,
        linear_key_head_dim=model.linear_key_head_dim,
        linear_value_head_dim=model.linear_value_head_dim,
        linear_conv_kernel_dim=model.linear_conv_kernel_dim,
        num_experts=model.num_moe_experts,
        num_experts_per_tok=model.moe_router_topk,
        moe_intermediate_size=model.moe_ffn_hidden_size,
        shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
    )
