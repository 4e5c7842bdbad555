"""Model on a GPU against the reference and against the CPU: same parameter names, same losses.

bf16 through TransformerEngine and the fused delta rule. Correctness tests that also run on a CPU take the backend as a
parameter (fixture `backend`) and are next to what they test. Not covered: speed.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_q3n import hf
from megatron_q3n.config import validate
from tests.backends import GPU_TE, GPU_TORCH, GPU_TORCH_BF16, Backend, qualify_kernels

pytestmark = pytest.mark.gpu

# heads of 128, for which the fused delta-rule kernels exist
MODEL = {
    "hidden_size": 256,
    "kv_channels": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "vocab_size": 512,
    "moe_aux_loss_coeff": 0.0,
    "moe_router_load_balancing_type": "none",
}
TOKENS = 256
VARIANTS: dict[str, dict[str, Any]] = {
    "no gate": {"attention_gate": "none"},
    "headwise": {"attention_gate": "headwise"},
    "silu": {"attention_gate_activation": "silu"},
    "shared": {"attention_gate_shared": True},
    "values": {"attention_gate_position": "value"},
    "windows": {"mixer_pattern": "SG*S", "attention_window_tokens": 21},
    "only attention": {"mixer_pattern": "*"},
    "z-loss": {"moe_z_loss_coeff": 0.01},
    "expert bias": {"moe_router_enable_expert_bias": True},
}


def errors_of(backend: Backend, settings: dict[str, Any] | None = None) -> tuple[float, float]:
    """Return the relative errors of the loss and of the worst gradient, with the reference's weights."""
    from megatron_q3n.model.build import build_model
    from tests.model.reference.test_model import reference

    # bf16 rounding may route a token to another expert, so every token is routed to every expert
    is_bf16 = backend.compute == "bf16"
    model_settings = MODEL | ({"moe_router_topk": 8} if is_bf16 else {}) | (settings or {})
    config = validate({"model": model_settings, "precision": {"compute": backend.compute}})
    exact = reference(config.model)
    device, parallel = backend.alone
    print(qualify_kernels(device.torch_device, config))
    model = build_model(config, backend.model, parallel.groups)[0].to(device.torch_device).train()
    weights = hf.to_megatron(exact.state_dict(), config.model)
    model.load_state_dict(weights, strict=False)
    tokens = torch.randint(0, 512, (2, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(TOKENS).expand(2, -1)
    cuda = [x.cuda() for x in (tokens[:, :-1], positions, tokens[:, 1:].contiguous())]
    ours = model(cuda[0], cuda[1], None, labels=cuda[2], loss_mask=torch.ones(2, TOKENS).cuda())
    ours.sum().backward()
    gradients = {n: p.grad.float().cpu() / ours.numel() for n, p in model.named_parameters()}
    expected = exact(tokens[:, :-1], tokens[:, 1:])
    expected.loss.backward()
    published = {n: p.grad for n, p in exact.named_parameters()}
    reference_gradients = hf.to_megatron(published, config.model, gradients=True)
    # small sums of large terms
    unstable = ("A_log", "dt_bias") if is_bf16 else ()
    worst = max(
        ((gradients[n] - g).norm() / g.norm(), n) for n, g in reference_gradients.items() if not n.endswith(unstable)
    )
    print(f"loss {ours.mean().item()} {expected.lm_loss.item()}, worst gradient {worst}")
    return ours.mean().item() / expected.lm_loss.item() - 1, worst[0].item()


@pytest.mark.parametrize(
    ("which", "loss_tolerance", "gradient_tolerance"),
    [(GPU_TORCH, 1e-5, 1e-3), (GPU_TORCH_BF16, 5e-3, 0.3), (GPU_TE, 5e-3, 0.3)],
    ids=lambda value: getattr(value, "id", ""),
)
def test_matches_the_reference(which: Backend, loss_tolerance: float, gradient_tolerance: float, alone: Any) -> None:
    loss, gradient = errors_of(replace(which, alone=alone))
    assert abs(loss) < loss_tolerance
    assert gradient < gradient_tolerance


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants_match_the_reference(variant: dict[str, Any], alone: Any) -> None:
    """Gates, windows and router options in TransformerEngine; every expert is selected: the bias has no effect."""
    loss, gradient = errors_of(replace(GPU_TE, alone=alone), variant)
    assert abs(loss) < 5e-3
    assert gradient < 0.3


def test_both_backends_have_one_set_of_names(alone: Any) -> None:
    from megatron_q3n.model.build import build_model

    config = validate({"model": MODEL, "precision": {"compute": "bf16"}})
    models = [build_model(config, name, alone[1].groups)[0] for name in ("torch", "transformer_engine")]
    names, keys = (
        [{n: (tuple(p.shape), p.dtype) for n, p in m.named_parameters()} for m in models],
        [set(m.sharded_state_dict()) for m in models],
    )
    assert names[0] == names[1]
    assert keys[0] == keys[1]
