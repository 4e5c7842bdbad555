"""Reference model in plain torch against transformers' Qwen3-Next, and multi-token prediction, which it lacks.

Multi-token prediction is compared with a model built from transformers' decoder layer and norm as in vLLM's
qwen3_next_mtp. That checks the connections, and not that the released model was trained with them. megatron-core is
compared in tests/model/test_parity.py.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_q3n.config import GATED_DELTA_NET, ModelConfig, UserError
from megatron_q3n.model.reference.layers import gated_delta_rule, routing
from megatron_q3n.model.reference.model import ReferenceModel, normalize_rows

VARIANTS = {
    "tiny": ModelConfig(),
    "other sizes": ModelConfig(
        hidden_size=72,
        num_attention_heads=6,
        num_query_groups=3,
        kv_channels=24,
        rotary_percent=0.5,
        rotary_base=1e4,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=12,
        linear_value_head_dim=20,
        linear_conv_kernel_dim=3,
        layernorm_epsilon=1e-5,
    ),
    "value heads = key heads": ModelConfig(linear_num_value_heads=4, num_query_groups=4),
    "five experts of twelve": ModelConfig(
        num_moe_experts=12, moe_router_topk=5, moe_ffn_hidden_size=24, moe_shared_expert_intermediate_size=40
    ),
    "eight layers, one mixer in two": ModelConfig(num_layers=8, mixer_pattern="G*"),
}
# more than one chunk of transformers' delta rule, and not a multiple of it
NUM_TOKENS = 77


def qwen3_next() -> ModuleType:
    """Import transformers' model without flash-linear-attention.

    transformers binds fla's Triton kernels when imported, even where there is no GPU to run them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fla", None)
        from transformers.models.qwen3_next import modeling_qwen3_next

    return modeling_qwen3_next


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Make transformers compute in `dtype` everywhere.

    Its code converts to fp32 explicitly (`x.float()`, `dtype=torch.float32`), which loses precision in a double model,
    where the tolerance is 1e-9. Here these conversions, and the default dtype of new tensors, are `dtype`. The formulas
    are unchanged.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", dtype)
        patch.setattr(torch, "float", dtype)
        patch.setattr(Tensor, "float", lambda x: x.to(dtype))
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def published_config(config: ModelConfig) -> object:
    kinds = {GATED_DELTA_NET: "linear_attention"}
    return qwen3_next().Qwen3NextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        layer_types=[kinds.get(mixer, "full_attention") for mixer in config.mixers],
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rotary_base,
            "partial_rotary_factor": config.rotary_percent,
        },
        rms_norm_eps=config.layernorm_epsilon,
        linear_num_key_heads=config.linear_num_key_heads,
        linear_num_value_heads=config.linear_num_value_heads,
        linear_key_head_dim=config.linear_key_head_dim,
        linear_value_head_dim=config.linear_value_head_dim,
        linear_conv_kernel_dim=config.linear_conv_kernel_dim,
        num_experts=config.num_moe_experts,
        num_experts_per_tok=config.moe_router_topk,
        moe_intermediate_size=config.moe_ffn_hidden_size,
        shared_expert_intermediate_size=config.moe_shared_expert_intermediate_size,
        attn_implementation="eager",
        # the grouped GEMM does not support fp64
        experts_implementation="eager",
    )


@torch.no_grad()
def move_from_init(model: nn.Module, seed: int = 0) -> None:
    """Set weights far from their initialization, so that no weight of 0 or 1 hides an error in a formula.

    Decay rates A are around 0.1. With the initial 0.01 to 16, many heads decay all but the last token, some outputs are
    nearly zero, and the norm after them amplifies rounding: fp32 then differs from fp64 by up to 6e-4, both in
    transformers and here.
    """
    starts = {"A_log": -2.0, "dt_bias": 1.0, "linear_attn.norm.weight": 1.0}
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        if weight.ndim == 1:
            start = next((start for end, start in starts.items() if name.endswith(end)), 0.0)
            weight.copy_(start + 0.25 * noise)
        else:
            weight.copy_(noise * (0.3 if "conv1d" in name else 0.08))


def one_by_one(fused: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split the fused expert weights of transformers 5 into one per expert."""
    split: dict[str, Tensor] = {}
    for name, tensor in fused.items():
        prefix, _, kind = name.rpartition(".experts.")
        for number, expert in enumerate(tensor) if prefix else ():
            gate, up = expert.chunk(2)
            parts = {"gate": gate, "up": up} if kind == "gate_up_proj" else {"down": expert}
            split |= {f"{prefix}.experts.{number}.{part}_proj.weight": weight for part, weight in parts.items()}
        if not prefix:
            split[name] = tensor
    return split


def some_tokens(config: ModelConfig, seed: int = 1, num_tokens: int = NUM_TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (2, num_tokens), generator=generator)


def reference(config: ModelConfig, dtype: torch.dtype = torch.float64) -> ReferenceModel:
    model = ReferenceModel(config).init_weights(0).to(dtype)
    move_from_init(model)
    return model


@pytest.mark.parametrize(
    ("dtype", "logit_tolerance", "gradient_tolerance"),
    [(torch.float64, 1e-9, 1e-8), (torch.float32, 1e-4, 1e-3)],
    ids=["fp64", "fp32"],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_match_transformers(
    variant: str, dtype: torch.dtype, logit_tolerance: float, gradient_tolerance: float
) -> None:
    config = VARIANTS[variant].model_copy(update={"mtp_num_layers": 0})
    tokens, labels = some_tokens(config), some_tokens(config, seed=2)
    with precision(dtype):
        published = qwen3_next().Qwen3NextForCausalLM(published_config(config))
        move_from_init(published)
        published_logits = published(tokens).logits
        F.cross_entropy(published_logits.flatten(0, 1), labels.flatten()).backward()

    ours = ReferenceModel(config).to(dtype)
    ours.load_state_dict(one_by_one(published.state_dict()))  # strict: every name and shape
    out = ours(tokens, labels, with_balance=False)
    out.loss.backward()

    assert published_logits.dtype == out.logits_BTV.dtype == dtype
    torch.testing.assert_close(out.logits_BTV, published_logits, rtol=0, atol=logit_tolerance)
    gradients = one_by_one({name: p.grad for name, p in published.named_parameters()})
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - gradients[name]).abs().max() / gradients[name].abs().max()
        assert error <= gradient_tolerance, f"{name}: {error:.1e}"


def test_multi_token_prediction_matches_one_built_from_transformers_modules() -> None:
    config = ModelConfig()
    tokens, dtype = some_tokens(config), torch.float64
    ours = reference(config)
    state = ours.state_dict()

    def load(module: nn.Module, prefix: str) -> nn.Module:
        weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        for kind, parts in {"gate_up": ("gate", "up"), "down": ("down",)}.items():
            experts = [
                torch.cat([weights.pop(f"mlp.experts.{e}.{part}_proj.weight") for part in parts])
                for e in range(config.num_moe_experts)
                if f"mlp.experts.{e}.{parts[0]}_proj.weight" in weights
            ]
            weights |= {f"mlp.experts.{kind}_proj": torch.stack(experts)} if experts else {}
        module.load_state_dict(weights)
        return module

    def norm(name: str) -> nn.Module:
        published_norm = modeling.Qwen3NextRMSNorm(config.hidden_size, config.layernorm_epsilon)
        return load(published_norm, name + ".")

    modeling = qwen3_next()
    with precision(dtype), torch.no_grad():
        settings = published_config(config.model_copy(update={"mixer_pattern": "*"}))
        layer = load(modeling.Qwen3NextDecoderLayer(settings, 0), "mtp.layers.0.")
        final_state = norm("model.norm")(trunk_before_norm(ours, tokens))
        next_tokens = torch.cat((tokens[:, 1:], torch.zeros_like(tokens[:, :1])), 1)
        embedding = state["model.embed_tokens.weight"][next_tokens]
        both = (norm("mtp.pre_fc_norm_embedding")(embedding), norm("mtp.pre_fc_norm_hidden")(final_state))
        hidden = torch.cat(both, -1) @ state["mtp.fc.weight"].T
        positions = torch.arange(NUM_TOKENS)[None]
        rotary = modeling.Qwen3NextRotaryEmbedding(settings)(hidden, positions)
        mask = torch.full((NUM_TOKENS, NUM_TOKENS), -torch.inf).triu(1)[None, None]
        hidden = norm("mtp.norm")(layer(hidden, position_embeddings=rotary, attention_mask=mask))
        expected = hidden @ state["lm_head.weight"].T

    torch.testing.assert_close(ours(tokens).mtp_logits[0], expected, rtol=0, atol=1e-9)


def trunk_before_norm(model: ReferenceModel, tokens: Tensor) -> Tensor:
    hidden = model.model.embed_tokens(tokens)
    for layer in model.model.layers:
        hidden, _ = layer(hidden)
    return hidden


@torch.no_grad()
def test_each_depth_depends_on_one_more_token() -> None:
    config = ModelConfig(mtp_num_layers=2)
    model, tokens, changed_at = reference(config), some_tokens(config), 40
    changed = tokens.clone()
    changed[:, changed_at] = (tokens[:, changed_at] + 1) % config.vocab_size
    before, after = model(tokens), model(changed)
    pairs = [(before.logits_BTV, after.logits_BTV), *zip(before.mtp_logits, after.mtp_logits)]
    for depth, (one, other) in enumerate(pairs):
        first_difference = (one != other).any(-1).any(0).int().argmax()
        assert first_difference == changed_at - depth


@pytest.mark.parametrize("repeated", [False, True])
def test_loss_is_the_sum_of_its_parts(repeated: bool) -> None:
    config = ModelConfig(
        mtp_num_layers=2, mtp_use_repeated_layer=repeated, mtp_loss_scaling_factor=0.3, moe_aux_loss_coeff=0.05
    )
    model = reference(config)
    text = some_tokens(config, num_tokens=21)
    tokens, labels = text[:, :-1], text[:, 1:]
    mask = (some_tokens(config, seed=3, num_tokens=20) % 3 > 0).double()
    with torch.no_grad():
        out = model(tokens, labels, mask)
        plain = model(tokens, labels, mask, with_balance=False)

    def mean_loss(logits: Tensor, ahead: int) -> float:
        """Average over the positions whose target, `ahead` tokens later, exists and is not masked."""
        losses = [
            -logits[b, t].log_softmax(-1)[text[b, t + ahead]].item()
            for b in range(2)
            for t in range(20 - ahead + 1)
            if mask[b, t + ahead - 1]
        ]
        return sum(losses) / len(losses)

    parts = [mean_loss(logits, k) for k, logits in enumerate((out.logits_BTV, *out.mtp_logits), 1)]
    assert [out.lm_loss.item(), *(x.item() for x in out.mtp_losses)] == pytest.approx(parts)
    balance = [x.item() for x in out.balance_loss]
    assert len(balance) == config.num_layers + 2 == len(out.router_loads) == len(out.router_probs)
    further = sum(balance[-2:]) / (2 if repeated else 1)
    without = parts[0] + 0.3 / 2 * (parts[1] + parts[2])
    assert plain.loss.item() == pytest.approx(without)
    assert out.loss.item() == pytest.approx(without + 0.05 * (sum(balance[:-2]) + further))


def test_balance_loss_is_that_of_transformers_for_one_layer() -> None:
    logits = torch.randn(60, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with precision(torch.float64):
        published = qwen3_next().load_balancing_loss_func((logits,), num_experts=8, top_k=3)
    ours = routing(logits, logits.topk(3).indices, batch=2)
    assert (3 * ours.balance_loss).item() == pytest.approx(published.item(), rel=1e-12)
    assert ours.load_E.sum().item() == pytest.approx(1)
    assert ours.probs_BTE.shape == (2, 30, 8)


def test_balance_loss_is_one_when_balanced_and_reduces_overused_experts() -> None:
    balanced = routing(torch.zeros(8, 4), torch.arange(8)[:, None] % 4, batch=1)
    assert balanced.balance_loss.item() == pytest.approx(1)
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.0]] * 8, requires_grad=True)
    routing(logits, logits.topk(1).indices, batch=1).balance_loss.backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_delta_rule_is_the_papers_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
    values = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    keys = F.normalize(keys, dim=-1)
    alpha, beta = torch.rand(2, 9, generator=generator, dtype=torch.float64)
    state, expected = torch.zeros(3, 4, dtype=torch.float64), []
    for k, q, v, a, b in zip(keys, queries, values, alpha, beta):
        state = state @ (a * (torch.eye(4) - b * torch.outer(k, k))) + b * torch.outer(v, k)
        expected.append(state @ q)
    one_head = [x[None, :, None] for x in (queries, keys, values)]
    gates = [x[None, :, None] for x in (alpha.log(), beta)]
    out = gated_delta_rule(*one_head, *gates)
    torch.testing.assert_close(out[0, :, 0], torch.stack(expected), rtol=0, atol=1e-14)


def test_initialization_is_the_published_one_and_depends_on_the_seed() -> None:
    config = ModelConfig(hidden_size=256, num_moe_experts=16)
    state = ReferenceModel(config).init_weights(5).state_dict()
    again, other = (ReferenceModel(config).init_weights(seed).state_dict() for seed in (5, 6))
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not torch.equal(state["lm_head.weight"], other["lm_head.weight"])
    for name, weight in state.items():
        if name.endswith(".mlp.gate.weight"):
            expected = torch.full((16,), config.init_method_std * 256**0.5)
            torch.testing.assert_close(weight.norm(dim=1), expected)
        elif name.endswith(("dt_bias", "linear_attn.norm.weight")):
            assert (weight == 1).all(), name
        elif "norm" in name:
            assert (weight == 0).all(), name
        elif name.endswith("A_log"):
            assert (weight.exp() >= 0.0099).all(), name
            assert (weight.exp() <= 16).all(), name
        elif "conv1d" not in name:
            assert weight.std().item() == pytest.approx(config.init_method_std, rel=0.2), name


def test_normalizing_router_rows_keeps_their_direction() -> None:
    rows = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    normalized = rows.clone()
    normalize_rows(normalized, std=0.5)
    torch.testing.assert_close(F.cosine_similarity(rows, normalized), torch.ones(6))


def test_multi_token_prediction_has_the_published_names() -> None:
    config = ModelConfig()
    state = {k: v.shape for k, v in ReferenceModel(config).state_dict().items()}
    mtp = {name.removeprefix("mtp."): shape for name, shape in state.items() if "mtp" in name}
    layer = {name.removeprefix("layers.0.") for name in mtp if name.startswith("layers.0.")}
    attention_layer = {k.removeprefix("model.layers.3.") for k in state if "model.layers.3." in k}
    assert layer == attention_layer
    assert {k: tuple(v) for k, v in mtp.items() if not k.startswith("layers.0.")} == {
        "fc.weight": (128, 256),
        "pre_fc_norm_embedding.weight": (128,),
        "pre_fc_norm_hidden.weight": (128,),
        "norm.weight": (128,),
    }


def test_half_precision_rounds_no_router_and_no_loss() -> None:
    config = ModelConfig()
    tokens = some_tokens(config)
    out = reference(config, torch.bfloat16)(tokens, tokens)
    assert out.logits_BTV.dtype == out.mtp_logits[0].dtype == torch.bfloat16
    assert out.loss.dtype == out.router_probs[0].dtype == torch.float32
    assert out.loss.isfinite()


@pytest.mark.parametrize("setting", [{"moe_router_load_balancing_type": "seq_aux_loss"}])
def test_unsupported_settings_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        ReferenceModel(ModelConfig(**setting))
