"""Sublayers with fused norms, sums and attention inputs equal megatron-core's, gradients included.

One process: in fp32 with the kernels in Triton's interpreter, or on a GPU in bf16 between TransformerEngine's
products.
"""

from typing import Any

import pytest
import torch

from megatron_q3n.config import validate
from megatron_q3n.config.execution_plan import Kernel
from tests.execution_plans import fused_plan, launched_kernels, use_plan

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
FUSED = {Kernel.QKV_NORM_ROPE, Kernel.PERMUTATION, Kernel.RESIDUAL_NORM, Kernel.SHARED_EXPERT_GATE, Kernel.SWIGLU}


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
    """Move all weights away from their initialization, where those of norms are zero."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        parameter.data += 0.1 * noise.to(parameter)


@pytest.mark.parametrize("recompute", [None, "moe", "full"])
def test_fused_sublayers_are_megatrons(recompute: str | None, alone: Any, triton_device: str) -> None:
    """Without activation checkpointing (recompute), and with kinds of it that use megatron-core's code or run twice."""
    from megatron_q3n.model.build import build_model

    if triton_device != "cpu":
        pytest.skip("test_fused_sublayers_are_transformer_engines is for GPUs")
    training: dict[str, Any] = {}
    if recompute == "full":
        training = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute:
        training = {"recompute_granularity": "selective", "recompute_modules": [recompute]}
    config = validate({"model": MODEL, "training": training})
    model = build_model(config, "torch", alone[1].groups)[0].train()
    move(model)
    expected = loss_and_gradients(model)
    kernels = FUSED | {Kernel.GATED_DELTA_MIXER}
    with use_plan(model, fused_plan(config, kernels)), launched_kernels() as launched:
        got = loss_and_gradients(model)
    assert launched == kernels
    for name, exact in expected.items():
        assert (got[name] - exact).norm() <= 1e-3 * exact.norm(), name


def test_passes_without_gradients_round_alike(alone: Any, triton_device: str) -> None:
    """In bf16, bit for bit: a full recomputation must select the experts of its first pass, and log probabilities in
    reinforcement learning must be the trainer's."""
    from megatron_q3n.model.build import build_model

    if triton_device != "cpu":
        pytest.skip("libraries choose other kernels without gradients; this test is about the sublayers only")
    config = validate({"model": MODEL, "precision": {"compute": "bf16"}})
    model = build_model(config, "torch", alone[1].groups)[0].train()
    move(model)
    tokens = torch.randint(0, MODEL["vocab_size"], (2, TOKENS), generator=torch.Generator())
    arguments = tokens, torch.arange(TOKENS).expand(2, -1), None
    with use_plan(model, fused_plan(config, FUSED)):
        with torch.no_grad():
            without = model(*arguments)
        assert torch.equal(without, model(*arguments))


@pytest.mark.gpu
def test_fused_sublayers_are_transformer_engines(alone: Any) -> None:
    """Every token is routed to every expert, so that rounding does not change the routing."""
    from megatron_q3n.model.build import build_model

    sizes = {"hidden_size": 256, "kv_channels": 64, "moe_router_topk": 4}
    config = validate({"model": MODEL | sizes, "precision": {"compute": "bf16"}})
    model = build_model(config, "transformer_engine", alone[1].groups)[0].cuda().train()
    move(model)
    expected = loss_and_gradients(model, "cuda")
    with use_plan(model, fused_plan(config, FUSED)), launched_kernels() as launched:
        got = loss_and_gradients(model, "cuda")
    assert launched == FUSED
    errors = {n: ((got[n] - x).norm() / x.norm()).item() for n, x in expected.items()}
    print({n: f"{error:.1e}" for n, error in errors.items()})
    assert max(errors.values()) < 0.05
