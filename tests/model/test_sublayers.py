"""Sublayers with their fused norms, sums and attention inputs give what megatron-core's give, gradients included.

One process: in fp32 with the kernels in Triton's interpreter, or on a GPU in bf16 between TransformerEngine's
products.
"""

from typing import Any

import pytest
import torch

from megatron_q3n.config import validate
from megatron_q3n.kernels import registry, residual_norm
from megatron_q3n.kernels.attention import qkv_norm_rope
from megatron_q3n.kernels.moe import permutation, shared_expert_gate, swiglu

TOKENS = 12
MODEL = {
    "num_layers": 2,
    "mixer_pattern": "G*",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "vocab_size": 512,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
}
MODULES = (qkv_norm_rope, permutation, residual_norm, shared_expert_gate, swiglu)
FUSED = {module.OPERATION for module in MODULES}


def loss_and_gradients(model: Any, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, MODEL["vocab_size"], (2, TOKENS + 1), generator=generator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    positions = torch.arange(TOKENS).expand(2, -1)
    model.zero_grad()
    inputs, positions, labels, mask = (x.to(device) for x in (inputs, positions, labels, torch.ones(2, TOKENS)))
    losses = model(inputs, positions, None, labels=labels, loss_mask=mask)
    losses.sum().backward()
    return {"loss": losses.detach()} | {n: p.grad for n, p in model.named_parameters()}


def move(model: Any) -> None:
    """Take all weights from where they begin: norms' are zero there."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        parameter.data += 0.1 * noise.to(parameter)


@pytest.mark.parametrize("recompute", [None, "moe", "full"])
def test_fused_sublayers_are_megatrons(
    recompute: str | None, alone: Any, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing recomputed, and with what makes a sublayer go megatron-core's way, in parts or twice."""
    from megatron_q3n.model.build import build_model

    if triton_device != "cpu":
        pytest.skip("the next test is for GPUs")
    training: dict[str, Any] = {}
    if recompute == "full":
        training = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute:
        training = {"recompute_granularity": "selective", "recompute_modules": [recompute]}
    config = validate({"model": MODEL, "training": training})
    model = build_model(config, "torch", alone[1].groups)[0].train()
    move(model)
    wanted = loss_and_gradients(model)
    seen = set()

    def is_fused(operation: str, tensor: torch.Tensor, forced: bool | None = None) -> bool:
        seen.add(operation)
        return operation in FUSED

    monkeypatch.setattr(registry, "is_fused", is_fused)
    got = loss_and_gradients(model)
    assert seen >= FUSED
    for name, exact in wanted.items():
        assert (got[name] - exact).norm() <= 1e-3 * exact.norm(), name


def test_passes_without_gradients_round_alike(alone: Any, triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, to the last bit: a full recomputation must choose the experts that its first pass chose, and a score
    in reinforcement learning must be the trainer's."""
    from megatron_q3n.model.build import build_model

    if triton_device != "cpu":
        pytest.skip("libraries choose their kernels by what they must keep; here only the sublayers differ")
    config = validate({"model": MODEL, "precision": {"compute": "bf16"}})
    model = build_model(config, "torch", alone[1].groups)[0].train()
    move(model)
    monkeypatch.setattr(registry, "is_fused", lambda operation, *_: operation in FUSED)
    tokens = torch.randint(0, MODEL["vocab_size"], (2, TOKENS), generator=torch.Generator())
    given = tokens, torch.arange(TOKENS).expand(2, -1), None
    with torch.no_grad():
        without = model(*given)
    assert torch.equal(without, model(*given))


@pytest.mark.gpu
def test_fused_sublayers_are_transformer_engines(alone: Any) -> None:
    """Every expert takes every token, so that no rounding sends one elsewhere."""
    from megatron_q3n.model.build import build_model

    sizes = {"hidden_size": 256, "kv_channels": 64, "moe_router_topk": 4}
    config = validate({"model": MODEL | sizes, "precision": {"compute": "bf16"}})
    model = build_model(config, "transformer_engine", alone[1].groups)[0].cuda().train()
    move(model)
    registry.forget()
    wanted = loss_and_gradients(model, "cuda")
    try:
        for operation in FUSED:
            registry.allow(operation)
        got = loss_and_gradients(model, "cuda")
    finally:
        registry.forget()
    errors = {n: ((got[n] - x).norm() / x.norm()).item() for n, x in wanted.items()}
    print({n: f"{error:.1e}" for n, error in errors.items()})
    assert max(errors.values()) < 0.05
