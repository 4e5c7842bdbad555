"""Parity of the megatron-core model with the reference model (model/reference/model.py) and with transformers.

fp32, one process. Not covered: layouts.
"""

from typing import Any

import pytest
import torch

from megatron_q3n import hf
from megatron_q3n.config import validate
from tests.model.reference.test_model import move_from_init, published_config, qwen3_next, reference

# not a multiple of the chunk
TOKENS = 150


def megatron_model(config: Any, alone: Any) -> Any:
    from megatron_q3n.model.build import build_model

    _device, parallel = alone
    return build_model(config, "torch", parallel.groups)[0].train()


def set_weights(model: Any, weights: dict[str, torch.Tensor]) -> None:
    expected = {name for name, _ in model.named_parameters()}
    assert expected == set(weights)
    model.load_state_dict(weights, strict=False)


ATTENTION = {"mixer_pattern": "*", "num_layers": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "no-mtp": {"mtp_num_layers": 0},
    "two-depths": {"mtp_num_layers": 2},
    "repeated-mtp": {"mtp_num_layers": 2, "mtp_use_repeated_layer": True},
    "other-heads": {
        "num_attention_heads": 6,
        "num_query_groups": 3,
        "kv_channels": 16,
        "rotary_percent": 0.5,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_value_head_dim": 24,
        "num_moe_experts": 5,
        "moe_router_topk": 3,
    },
    "attention-first": {"mixer_pattern": "*G", "linear_chunk_size": 32},
    "only-attention": ATTENTION,
    "only-gated-delta-net": {"mixer_pattern": "G", "num_layers": 2, "mtp_num_layers": 0},
    "sliding-windows": {"mixer_pattern": "SG*S", "attention_window_tokens": 21},
    "window-of-everything": {**ATTENTION, "mixer_pattern": "S", "attention_window_tokens": 500},
    "no-gate": ATTENTION | {"attention_gate": "none"},
    "headwise": ATTENTION | {"attention_gate": "headwise"},
    "silu": ATTENTION | {"attention_gate_activation": "silu"},
    "shared": ATTENTION | {"attention_gate_shared": True, "attention_gate_activation": "silu"},
    "shared-headwise": ATTENTION | {"attention_gate": "headwise", "attention_gate_shared": True},
    "values": ATTENTION | {"attention_gate_position": "value"},
    "values-headwise": ATTENTION
    | {"attention_gate": "headwise", "attention_gate_position": "value", "attention_gate_activation": "silu"},
    "values-shared": ATTENTION | {"attention_gate_position": "value", "attention_gate_shared": True},
    "z-loss": ATTENTION | {"moe_z_loss_coeff": 0.1},
    "z-loss-of-repeated-mtp": ATTENTION
    | {"moe_z_loss_coeff": 0.1, "mtp_num_layers": 2, "mtp_use_repeated_layer": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_the_reference(variant: str, alone: Any) -> None:
    """Loss within 1e-6 relative, logits within 1e-4, gradients within 1e-3 relative, MTP and balance included."""
    # a router used at several depths balances their tokens together, the reference each depth separately
    coeff = 0.0 if VARIANTS[variant].get("mtp_use_repeated_layer") else 0.1
    config = validate({"model": VARIANTS[variant] | {"moe_aux_loss_coeff": coeff}})
    exact = reference(config.model)
    model = megatron_model(config, alone)
    set_weights(model, hf.to_megatron(exact.state_dict(), config.model))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.model.vocab_size, (2, TOKENS + 1), generator=generator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    mask = (torch.rand(2, TOKENS, generator=generator) > 0.2).float()
    positions = torch.arange(TOKENS).expand(2, -1)

    # in fp64, because the rounding of the recurrence in fp32 would be half of the tolerance
    expected = exact(inputs, labels, mask.double())
    expected.loss.backward()

    from megatron_q3n.model.moe.router import finish_balance, routers_of

    routers = list(routers_of([model]).values())
    for router, load in zip(routers, expected.router_loads):
        # as if the previous global batch had been this one
        router.expert_load.copy_(load)
    losses = model(inputs, positions, None, labels=labels, loss_mask=mask)
    # the balance loss counts all tokens, the language model loss the unmasked ones
    scale = TOKENS * 2 / mask.sum()
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    # schedules set both before every backward pass; earlier tests leave other values
    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    MoEAuxLossAutoScaler.set_loss_scale(1 / scale)
    (losses * mask).sum().backward()
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    ours = (losses * mask).sum() / mask.sum()

    assert ours.item() == pytest.approx(expected.lm_loss.item(), rel=1e-6)
    published = {n: p.grad for n, p in exact.named_parameters()}
    expected_gradients = hf.to_megatron(published, config.model, gradients=True)
    for name, parameter in model.named_parameters():
        want, got = expected_gradients[name].float(), parameter.grad / mask.sum()
        error = (got - want).abs().max() / want.abs().max().clamp(min=1e-9)
        assert error < 1e-3, f"{name}: gradient off by {error:.1e}"
    if not config.model.mtp_use_repeated_layer:
        _, balance = finish_balance(routers, alone[1].groups.tp_dp_cp)
        torch.testing.assert_close(balance, torch.stack(expected.balance_loss).float().detach(), rtol=1e-5, atol=0)

    model.eval()
    with torch.no_grad():
        logits = model(inputs, positions, None)
    torch.testing.assert_close(logits, expected.logits_BTV.float().detach(), rtol=0, atol=1e-4)


def test_mtp_loss_matches_the_reference(alone: Any) -> None:
    """The reported loss per depth is the mean over the tokens of its own mask."""
    config = validate({"model": VARIANTS["two-depths"]})
    exact = reference(config.model)
    model = megatron_model(config, alone)
    set_weights(model, hf.to_megatron(exact.state_dict(), config.model))
    tokens = torch.randint(0, 512, (2, 41), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 40)
    mask[:, -7:] = 0
    expected = exact(tokens[:, :-1], tokens[:, 1:], mask.double()).mtp_losses
    positions = torch.arange(40).expand(2, -1)
    model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous(), loss_mask=mask)
    totals = model.config.pass_state.mtp.pop_totals()
    got = totals[:, 0] / totals[:, 1]
    torch.testing.assert_close(got, torch.stack(expected).detach(), rtol=1e-6, atol=0)


def test_matches_transformers(alone: Any) -> None:
    """Against Qwen3NextForCausalLM, same random weights: logits within 1e-4, gradients within 1e-3 relative."""
    settings = {"mtp_num_layers": 0, "moe_aux_loss_coeff": 0.0, "moe_router_load_balancing_type": "none"}
    config = validate({"model": settings})
    published_model = qwen3_next().Qwen3NextForCausalLM(published_config(config.model))
    move_from_init(published_model)
    model = megatron_model(config, alone)
    set_weights(model, hf.to_megatron(published_model.state_dict(), config.model))
    tokens = torch.randint(0, 512, (2, TOKENS + 1), generator=torch.Generator().manual_seed(3))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    logits = published_model(inputs).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    positions = torch.arange(TOKENS).expand(2, -1)
    losses = model(inputs, positions, None, labels=labels, loss_mask=torch.ones(2, TOKENS))
    losses.mean().backward()
    published = {n: p.grad for n, p in published_model.named_parameters()}
    expected = hf.to_megatron(published, config.model, gradients=True)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-9)
        assert error < 1e-3, f"{name}: gradient off by {error:.1e}"
    with torch.no_grad():
        got = model.eval()(inputs, positions, None)
    torch.testing.assert_close(got, logits.detach(), rtol=0, atol=1e-4)
