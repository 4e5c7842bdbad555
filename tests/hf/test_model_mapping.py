"""Weight mapping: names, shapes, positions of values, exact round trips, and error messages.

That both models compute the same with converted weights is tested in the parity tests, not here.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_q3n.config import ModelConfig, UserError
from megatron_q3n.hf import param_mappings, to_hf, to_megatron
from megatron_q3n.model.reference.model import ReferenceModel

OUT_NORM = "decoder.layers.0.self_attention.out_norm.weight"
PUBLISHED_OUT_NORM = "model.layers.0.linear_attn.norm.weight"


def some_weights(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return random Hugging Face weights; the norm that is not zero-centered is around 1."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in ReferenceModel(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        center = 1 if name.endswith("linear_attn.norm.weight") else 0
        weights[name] = (center + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
    return weights


def fused(published: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Stack the experts as transformers 5 does in memory."""
    weights = dict(published)
    for prefix in {name.split("experts.")[0] for name in published if ".experts." in name}:

        def take(part: str, prefix: str = prefix) -> Tensor:
            names = [f"{prefix}experts.{e}.{part}.weight" for e in range(config.num_moe_experts)]
            return torch.stack([weights.pop(name) for name in names])

        gate_up = torch.cat((take("gate_proj"), take("up_proj")), 1)
        weights[prefix + "experts.gate_up_proj"] = gate_up
        weights[prefix + "experts.down_proj"] = take("down_proj")
    return weights


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare values exactly, in whatever dtype the shifted norm came back."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].double(), tensor.double()), name


def test_covers_every_megatron_name_with_its_shape() -> None:
    moe = {
        "pre_mlp_layernorm.weight": (128,),
        "mlp.router.weight": (8, 128),
        "mlp.experts.linear_fc1.weight": (8, 2 * 64, 128),
        "mlp.experts.linear_fc2.weight": (8, 128, 64),
        "mlp.shared_experts.linear_fc1.weight": (2 * 96, 128),
        "mlp.shared_experts.linear_fc2.weight": (128, 96),
        "mlp.shared_experts.gate_weight": (1, 128),
    }
    attention = {
        "input_layernorm.weight": (128,),
        "self_attention.linear_qkv.weight": (4 * 2 * 32 + 2 * 2 * 32, 128),
        "self_attention.q_layernorm.weight": (32,),
        "self_attention.k_layernorm.weight": (32,),
        "self_attention.linear_proj.weight": (128, 4 * 32),
    }
    delta_net = {
        "input_layernorm.weight": (128,),
        "self_attention.in_proj.weight": (2 * 64 + 2 * 192, 128),
        "self_attention.beta_alpha_proj.weight": (2 * 8, 128),
        "self_attention.conv1d.weight": (2 * 64 + 192, 1, 4),
        "self_attention.A_log": (8,),
        "self_attention.dt_bias": (8,),
        "self_attention.out_norm.weight": (24,),
        "self_attention.out_proj.weight": (128, 192),
    }
    predictor = {
        "enorm.weight": (128,),
        "hnorm.weight": (128,),
        "eh_proj.weight": (128, 256),
        "final_layernorm.weight": (128,),
    }
    expected = {
        "embedding.word_embeddings.weight": (512, 128),
        "decoder.final_norm.weight": (128,),
        "output_layer.weight": (512, 128),
    }
    layers = [delta_net, moe, delta_net, moe, delta_net, moe, attention, moe]
    for number, layer in enumerate(layers):
        expected |= {f"decoder.layers.{number}.{name}": shape for name, shape in layer.items()}
    expected |= {f"mtp.layers.0.{name}": shape for name, shape in predictor.items()}
    for number, layer in enumerate([attention, moe]):
        prefix = f"mtp.layers.0.mtp_model_layer.layers.{number}."
        expected |= {prefix + name: shape for name, shape in layer.items()}

    config = ModelConfig(moe_shared_expert_intermediate_size=96, linear_value_head_dim=24)
    assert {mapping.megatron: mapping.shape for mapping in param_mappings(config)} == expected
    converted = to_megatron(some_weights(config), config)
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == expected


def test_counts_the_released_model_on_both_sides() -> None:
    """79.67 B parameters and 1.65 B of multi-token prediction, in about 76,000 Hugging Face tensors."""
    released = ModelConfig(
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
    table = param_mappings(released)
    ours = sum(math.prod(mapping.shape) for mapping in table)
    published = [shape for mapping in table for shape in mapping.hf.values()]
    assert ours == sum(math.prod(shape) for shape in published)
    assert round(ours / 1e9, 2) == 81.32
    assert len(published) == 75944


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trips_are_exact_both_ways(dtype: torch.dtype) -> None:
    config = ModelConfig(linear_num_value_heads=4, num_moe_experts=3)
    published = some_weights(config, dtype)
    megatron = to_megatron(published, config)
    assert_same(to_hf(megatron, config), published)
    assert_same(to_megatron(to_hf(megatron, config), config), megatron)
    kept = {name: tensor for name, tensor in megatron.items() if "out_norm" not in name}
    assert {tensor.dtype for tensor in kept.values()} == {dtype}


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 3),
    query_heads_per_group=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    value_heads_per_key_head=st.integers(1, 3),
    key_dim=st.integers(1, 3),
    value_dim=st.integers(1, 3),
    experts=st.integers(1, 4),
    mtp=st.sampled_from([(0, False), (1, False), (1, True), (3, True)]),
)
def test_round_trips_are_exact_for_any_sizes(
    groups: int,
    query_heads_per_group: int,
    key_heads: int,
    value_heads_per_key_head: int,
    key_dim: int,
    value_dim: int,
    experts: int,
    mtp: tuple[int, bool],
) -> None:
    config = ModelConfig(
        vocab_size=5,
        hidden_size=4,
        num_layers=2,
        mixer_pattern="G*",
        num_attention_heads=groups * query_heads_per_group,
        num_query_groups=groups,
        kv_channels=2,
        rotary_percent=1,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=key_heads * value_heads_per_key_head,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        num_moe_experts=experts,
        moe_router_topk=1,
        moe_ffn_hidden_size=3,
        moe_shared_expert_intermediate_size=2,
        mtp_num_layers=mtp[0],
        mtp_use_repeated_layer=mtp[1],
    )
    published = some_weights(config)
    megatron = to_megatron(published, config)
    assert_same(to_hf(megatron, config), published)
    assert_same(to_megatron(fused(published, config), config), megatron)
    assert {name: tuple(x.shape) for name, x in megatron.items()} == {
        mapping.megatron: mapping.shape for mapping in param_mappings(config)
    }


def test_attention_rows_land_by_key_value_head() -> None:
    config = ModelConfig(num_attention_heads=6, num_query_groups=2, kv_channels=4, rotary_percent=1)
    published = some_weights(config)
    joined = to_megatron(published, config)["decoder.layers.6.self_attention.linear_qkv.weight"]
    q, k, v = (published[f"model.layers.3.self_attn.{name}_proj.weight"] for name in "qkv")
    rows = []
    for group in range(2):
        heads = range(3 * group, 3 * group + 3)
        rows += [q[8 * head : 8 * head + 4] for head in heads]
        rows += [q[8 * head + 4 : 8 * head + 8] for head in heads]  # gates
        rows += [x[4 * group : 4 * group + 4] for x in (k, v)]
    assert torch.equal(joined, torch.cat(rows))


def test_delta_net_rows_land_flat() -> None:
    config = ModelConfig(
        linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=2, linear_value_head_dim=5
    )
    published, prefix = some_weights(config), "model.layers.1.linear_attn."
    megatron = to_megatron(published, config)
    by_head = published[prefix + "in_proj_qkvz.weight"].split([2, 2, 15, 15] * 2)
    flat = torch.cat([torch.cat(by_head[part::4]) for part in range(4)])
    assert torch.equal(megatron["decoder.layers.2.self_attention.in_proj.weight"], flat)
    b0, a0, b1, a1 = published[prefix + "in_proj_ba.weight"].split(3)
    beta_alpha = megatron["decoder.layers.2.self_attention.beta_alpha_proj.weight"]
    assert torch.equal(beta_alpha, torch.cat((b0, b1, a0, a1)))


def test_expert_rows_land_gate_before_up() -> None:
    config = ModelConfig()
    published = some_weights(config)
    megatron = to_megatron(published, config)
    for expert in range(config.num_moe_experts):
        prefix = f"model.layers.2.mlp.experts.{expert}."
        gate, up, down = (published[f"{prefix}{x}_proj.weight"] for x in ("gate", "up", "down"))
        stacked = [megatron[f"decoder.layers.5.mlp.experts.linear_fc{n}.weight"] for n in (1, 2)]
        assert torch.equal(stacked[0][expert, :64], gate)
        assert torch.equal(stacked[0][expert, 64:], up)
        assert torch.equal(stacked[1][expert], down)
    shared = "model.layers.2.mlp.shared_expert."
    gate, up = (published[f"{shared}{x}_proj.weight"] for x in ("gate", "up"))
    fc1 = megatron["decoder.layers.5.mlp.shared_experts.linear_fc1.weight"]
    assert torch.equal(fc1, torch.cat((gate, up)))


def test_halves_of_the_prediction_projection_stay_where_they_are() -> None:
    """megatron-core's eh_proj reads cat(embedding, hidden), like mtp.fc; a round trip hides a swap."""
    config = ModelConfig()
    published = some_weights(config)
    of_embedding, of_hidden = published["mtp.fc.weight"].chunk(2, 1)
    projection = to_megatron(published, config)["mtp.layers.0.eh_proj.weight"]
    assert torch.equal(projection[:, :128], of_embedding)
    assert torch.equal(projection[:, 128:], of_hidden)
    exported = to_hf(to_megatron(published, config), config)["mtp.fc.weight"]
    assert torch.equal(exported[:, :128], of_embedding)
    assert torch.equal(
        to_megatron(published, config)["mtp.layers.0.enorm.weight"], published["mtp.pre_fc_norm_embedding.weight"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_and_separate_experts_agree(dtype: torch.dtype) -> None:
    config = ModelConfig()
    published = some_weights(config, dtype)
    assert_same(to_megatron(fused(published, config), config), to_megatron(published, config))


def test_only_the_delta_net_norm_is_shifted_and_no_gradient_is() -> None:
    config = ModelConfig()
    ones = {name: torch.ones_like(x) for name, x in some_weights(config).items()}
    megatron = to_megatron(ones, config)
    shifted = {name for name, x in megatron.items() if not (x == 1).all()}
    assert shifted == {f"decoder.layers.{i}.self_attention.out_norm.weight" for i in (0, 2, 4)}
    assert all((megatron[name] == 0).all() for name in shifted)
    as_gradients = to_megatron(ones, config, gradients=True)
    assert all((x == 1).all() for x in as_gradients.values())
    assert_same(to_hf(as_gradients, config, gradients=True), ones)


def test_the_shift_loses_no_bit_of_bf16() -> None:
    config = ModelConfig(linear_value_head_dim=1024)
    published = some_weights(config, torch.bfloat16)
    every_bf16 = torch.arange(0x3B00, 0x3F00, dtype=torch.int16).view(torch.bfloat16)  # 2^-9 … 0.5
    published[PUBLISHED_OUT_NORM] = every_bf16
    megatron = to_megatron(published, config)
    assert torch.equal(to_hf(megatron, config)[PUBLISHED_OUT_NORM].bfloat16(), every_bf16)
    rounded = megatron | {OUT_NORM: megatron[OUT_NORM].bfloat16()}
    assert not torch.equal(to_hf(rounded, config)[PUBLISHED_OUT_NORM].bfloat16(), every_bf16)


def test_one_rule_reads_only_its_own_tensors() -> None:
    config = ModelConfig()
    published = some_weights(config)
    whole = to_megatron(published, config)
    read: list[str] = []
    for mapping in param_mappings(config):
        own = {name: published[name] for name in mapping.sources(published)}
        assert torch.equal(mapping.to_megatron(own), whole[mapping.megatron])
        read += own
    assert sorted(read) == sorted(published)


def test_depths_with_their_own_layers_are_read_and_not_exported() -> None:
    config = ModelConfig(mtp_num_layers=3)
    megatron = to_megatron(some_weights(config), config)
    names = [name for name in megatron if name.startswith("mtp.layers.")]
    assert {name.split(".")[2] for name in names} == {"0", "1", "2"}
    with pytest.raises(UserError, match=r"mtp_num_layers=3.*no published form"):
        to_hf(megatron, config)


def test_refuses_weights_that_do_not_fit_and_names_them() -> None:
    config = ModelConfig()
    published = some_weights(config)
    megatron = to_megatron(published, config)

    lacking = {k: v for k, v in published.items() if k != "model.layers.2.mlp.gate.weight"}
    with pytest.raises(UserError, match=r"1 missing: model\.layers\.2\.mlp\.gate\.weight"):
        to_megatron(lacking, config)
    with pytest.raises(UserError, match=r"1 unexpected: model\.layers\.9\.foo"):
        to_megatron(published | {"model.layers.9.foo": torch.zeros(1)}, config)
    lacking = {k: v for k, v in published.items() if "experts.7.down_proj" not in k}
    with pytest.raises(UserError, match=r"5 missing: model\.layers\.0\.mlp\.experts\.7\.down_proj"):
        to_megatron(lacking, config)
    name = "model.layers.3.self_attn.q_proj.weight"
    with pytest.raises(UserError, match=rf"{name} has shape \[1, 2\].*makes it \[256, 128\]"):
        to_megatron(published | {name: torch.zeros(1, 2)}, config)

    with pytest.raises(UserError, match=r"1 missing: output_layer\.weight; 1 unexpected: head"):
        to_hf({("head" if k == "output_layer.weight" else k): v for k, v in megatron.items()}, config)
    with pytest.raises(UserError, match=rf"{OUT_NORM} has shape \[3\]"):
        to_hf(megatron | {OUT_NORM: torch.zeros(3)}, config)


def test_a_rule_by_itself_names_what_it_lacks() -> None:
    mapping = param_mappings(ModelConfig())[0]
    with pytest.raises(UserError, match=r"1 missing: model\.embed_tokens\.weight"):
        mapping.to_megatron({})
