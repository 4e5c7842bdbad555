"""A layer's short way for a few tokens, with the fused kernels, equals the way of megatron-core's modules.

fp32 on one process; sizes and formats of the kernels are test_few_queries.py's matter.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.inference.tiny_model import tiny_model


def on_plain_torch(alone: Any, **settings: Any) -> Any:
    """Build a model without TransformerEngine, whose fp32 products are TF32."""
    device, parallel = alone
    return tiny_model((replace(device, model_backend="torch"), parallel), **settings)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attention_gate": "none"},
        {"mixer_pattern": "S*", "num_layers": 4, "attention_window_tokens": 5},
        {"attention_gate": "headwise"},
    ],
)
def test_attention_at_once_is_the_layers_own(
    alone: Any, settings: dict[str, Any], tokens: int, triton_device: str
) -> None:
    """Between its projections as one operation: as torch says it, and the fused kernels."""
    from megatron_q3n.model.cached_attention import RotaryRows, attend, attend_at_once, serves
    from megatron_q3n.model.decode import generating
    from megatron_q3n.model.decode_state import KeyValueCache
    from megatron_q3n.model.span import Span

    model = on_plain_torch(alone, **settings)
    device = next(model.parameters()).device
    attention = [x.self_attention for x in model.decoder.layers if hasattr(x, "self_attention")]
    mixers = [x for x in attention if hasattr(x, "linear_qkv")]
    known = settings.get("attention_gate", "none") == "none"
    assert [serves(mixer) for mixer in mixers] == [known] * len(mixers)
    if not known:
        return
    start_N = torch.tensor([9, 0, 37], device=device)
    span = Span.at(start_N, tokens, 50)
    table = RotaryRows.table(64, model.rotary_pos_emb, torch.float32)
    hidden = torch.randn(tokens, 3, 32, device=device)
    for mixer in mixers:
        for parameter in (mixer.q_layernorm.weight, mixer.k_layernorm.weight):
            torch.nn.init.normal_(parameter, std=0.2)
        old = [torch.randn(3, 2, 50, 32, device=device) for _ in range(2)]
        with generating(model), torch.no_grad():
            caches = [KeyValueCache(*(x.clone() for x in old)) for _ in range(3)]
            wanted = attend(mixer, hidden, caches[0], span, RotaryRows(table, span))
            for cache, fused in zip(caches[1:], (False, True)):
                ours = attend_at_once(mixer, hidden, cache, span, table, fused)
                torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
                torch.testing.assert_close(cache.key, caches[0].key, rtol=0, atol=1e-5)
                torch.testing.assert_close(cache.value, caches[0].value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_moe_experts": 8, "moe_router_topk": 3},
        {"moe_router_enable_expert_bias": True},
        {
            "megatron": {
                "moe_router_score_function": "sigmoid",
                "moe_router_topk_scaling_factor": 2.0,
            }
        },
    ],
)
def test_routes_of_few_tokens_are_the_routers_own(
    alone: Any, settings: dict[str, Any], triton_device: str
) -> None:
    from megatron_q3n.kernels.few_routes import route_few
    from megatron_q3n.model.few_experts import plain_choice

    model = on_plain_torch(alone, **settings).eval()
    router = next(x.mlp.router for x in model.decoder.layers if hasattr(x.mlp, "router"))
    if router.expert_bias is not None:
        router.expert_bias.normal_()
    choice = plain_choice(router)
    assert choice is not None
    hidden = torch.randn(5, 1, 32, device=next(model.parameters()).device)
    with torch.no_grad():
        wanted, chooses = router(hidden)
        gates, experts = route_few(hidden.flatten(0, 1), router.weight, choice, fused=True)
    ours = torch.zeros_like(wanted).scatter(1, experts, gates)
    assert torch.equal(ours > 0, chooses)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_routers_that_choose_otherwise_are_left_alone(alone: Any) -> None:
    from megatron_q3n.model.few_experts import plain_choice

    grouped = {"moe_router_num_groups": 2, "moe_router_group_topk": 1}
    model = on_plain_torch(alone, num_moe_experts=8, megatron=grouped)
    router = next(x.mlp.router for x in model.decoder.layers if hasattr(x.mlp, "router"))
    assert plain_choice(router) is None
