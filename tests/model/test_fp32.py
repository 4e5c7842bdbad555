"""fp32 parts of a bf16 model, checked where they are computed, on a CPU.

Not covered: attention's softmax, which is inside fused kernels. The reference model in bf16 is tested in
tests/model/reference/test_model.py.
"""

from typing import Any

import pytest
import torch

from megatron_q3n.config import validate


class DtypeProbe:
    """Probe of delta rules and routers: records the dtypes of gates and logits, and changes nothing."""

    is_active = True

    def __init__(self) -> None:
        self.dtypes: dict[str, set[torch.dtype]] = {"decay": set(), "beta": set(), "logits": set()}

    def wrap(self, rule: Any) -> Any:
        def recording_rule(query: Any, key: Any, value: Any, decay: Any, beta: Any, **options: Any) -> Any:
            self.dtypes["decay"].add(decay.dtype)
            self.dtypes["beta"].add(beta.dtype)
            return rule(query, key, value, decay, beta, **options)

        return recording_rule

    def run(self, router: Any, logits: Any, probs: Any, routing_map: Any) -> Any:
        self.dtypes["logits"].add(logits.dtype)
        return probs, routing_map


def test_gates_router_norms_and_loss_are_fp32_in_a_bf16_model(alone: Any) -> None:
    from megatron_q3n.model.build import build_model
    from megatron_q3n.model.gated_delta_net import GatedDeltaNet
    from megatron_q3n.model.moe.router import GlobalBatchRouter

    settings = {"moe_router_enable_expert_bias": True}
    config = validate({"model": settings, "precision": {"compute": "bf16"}})
    (model,) = build_model(config, "torch", alone[1].groups)
    tokens = torch.randint(0, 512, (1, 32), generator=torch.Generator().manual_seed(1))
    probe, state = DtypeProbe(), model.config.pass_state
    mixers, routers = (
        {module: probe for module in model.modules() if isinstance(module, kind)}
        for kind in (GatedDeltaNet, GlobalBatchRouter)
    )
    with state.probing(mixers), state.with_routing(routers):
        losses = model(tokens, torch.arange(32)[None], None, labels=tokens)
    assert losses.dtype == torch.float32
    assert probe.dtypes == {name: {torch.float32} for name in probe.dtypes}
    fp32 = ("A_log", "dt_bias", "out_norm.weight")
    for name, parameter in model.named_parameters():
        expected = torch.float32 if name.endswith(fp32) else torch.bfloat16
        assert parameter.dtype == expected, name
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
    # the last bit of the reciprocal square root may differ
    assert (norm(x) != exact.bfloat16()).float().mean() < 0.001
    attention = model.decoder.layers[6].self_attention
    gated = attention._apply_output_gate(x, other.unflatten(-1, (4, 32)))
    gate_fp32 = other.float()
    exact = x.float() * (gate_fp32.sigmoid() if gate == "sigmoid" else torch.nn.functional.silu(gate_fp32))
    torch.testing.assert_close(gated, exact.bfloat16(), rtol=0, atol=0)
