"""What stays in fp32 in a bf16 model: seen where it is computed, on a CPU.

Attention's softmax is inside fused kernels and is not looked at; the reference in bf16 is tests/model/reference/test_model.py's.
"""

from typing import Any

import pytest
import torch

from megatron_q3n.config import validate


def test_gates_router_norms_and_loss_are_fp32_in_a_bf16_model(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_q3n.kernels.gated_delta import backend as delta_rule_backend
    from megatron_q3n.model.build import build_model
    from megatron_q3n.model.moe.router import GlobalBatchRouter

    seen: dict[str, set[torch.dtype]] = {"decay": set(), "beta": set(), "logits": set()}
    rule, route = delta_rule_backend.gated_delta_rule, GlobalBatchRouter.routing

    def watched_rule(query: Any, key: Any, value: Any, decay: Any, beta: Any, **options: Any) -> Any:
        seen["decay"].add(decay.dtype)
        seen["beta"].add(beta.dtype)
        return rule(query, key, value, decay, beta, **options)

    def watched_route(self: Any, logits: Any, **options: Any) -> Any:
        seen["logits"].add(logits.dtype)
        return route(self, logits, **options)

    monkeypatch.setattr(delta_rule_backend, "gated_delta_rule", watched_rule)
    monkeypatch.setattr(GlobalBatchRouter, "routing", watched_route)
    settings = {"moe_router_enable_expert_bias": True}
    config = validate({"model": settings, "precision": {"compute": "bf16"}})
    (model,) = build_model(config, "torch", alone[1].groups)
    tokens = torch.randint(0, 512, (1, 32), generator=torch.Generator().manual_seed(1))
    losses = model(tokens, torch.arange(32)[None], None, labels=tokens)
    assert losses.dtype == torch.float32
    assert seen == {name: {torch.float32} for name in seen}
    fp32 = ("A_log", "dt_bias", "out_norm.weight")
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if name.endswith(fp32) else torch.bfloat16
        assert parameter.dtype == wanted, name
    router_state = {name: b.dtype for name, b in model.named_buffers() if ".router." in name}
    assert any(name.endswith("expert_bias") for name in router_state)
    assert any(name.endswith("expert_load") for name in router_state)
    assert set(router_state.values()) == {torch.float32}


@pytest.mark.parametrize("gate", ["sigmoid", "silu"])
def test_norm_statistics_and_output_gate_round_once(gate: str, alone: Any) -> None:
    """In bf16 the result is the fp32 result, rounded at the end."""
    from megatron_q3n.model.build import build_model

    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(64, 1, 128, generator=generator).bfloat16() for _ in range(2))
    config = validate({"model": {"attention_gate_activation": gate}, "precision": {"compute": "bf16"}})
    (model,) = build_model(config, "torch", alone[1].groups)
    norm = model.decoder.final_norm
    norm.weight.data = torch.randn(128, generator=generator).bfloat16() * 0.01
    exact = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    exact = exact * (1 + norm.weight.float())
    assert (norm(x) != exact.bfloat16()).float().mean() < 0.001  # the reciprocal root's last bit
    attention = model.decoder.layers[6].self_attention
    opened = attention._apply_output_gate(x, other.unflatten(-1, (4, 32)))
    wide = other.float()
    exact = x.float() * (wide.sigmoid() if gate == "sigmoid" else torch.nn.functional.silu(wide))
    torch.testing.assert_close(opened, exact.bfloat16(), rtol=0, atol=0)
