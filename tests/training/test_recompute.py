"""Activation recompute changes memory, never numbers: losses, gradient norms and balance as without it."""

from typing import Any

import pytest
import torch

from megatron_q3n.config import validate

CHOICES: dict[str, dict[str, Any]] = {
    "none": {},
    **{
        name: {"recompute_granularity": "selective", "recompute_modules": [name]}
        for name in ("core_attn", "moe", "moe_act", "shared_experts", "layernorm", "gated_delta_net")
    },
    "all selective": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "moe_act", "shared_experts", "layernorm", "gated_delta_net"],
    },
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def steps_of(choice: str, alone: Any) -> list[float]:
    from megatron_q3n.data.batch import causal_batch
    from megatron_q3n.training.state import build_state
    from megatron_q3n.training.step import train_step

    training = {"micro_batch_size": 2, "global_batch_size": 4, "sequence_length": 64}
    model = {"hidden_size": 64, "vocab_size": 64, "moe_aux_loss_coeff": 0.1}
    data = {"source": "blend", "train": [{"path": "unused"}]}
    state = build_state(validate({"training": training | CHOICES[choice], "model": model, "data": data}), *alone)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in state.models[0].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    values = []
    for _ in range(2):
        rows = torch.randint(0, 64, (4, 65), generator=generator)
        batches = [causal_batch(part[:, :-1], part[:, 1:].contiguous(), torch.ones(2, 64)) for part in rows.split(2)]
        report = train_step(state, batches)
        values += [report.loss, report.grad_norm, *report.mtp_losses, *report.balance_losses.values()]
    return values


@pytest.fixture(scope="module")
def kept(alone: Any) -> list[float]:
    """What training gives when every activation is kept."""
    return steps_of("none", alone)


@pytest.mark.parametrize("choice", [name for name in CHOICES if name != "none"])
def test_recompute_changes_nothing(choice: str, kept: list[float], alone: Any) -> None:
    assert steps_of(choice, alone) == pytest.approx(kept, rel=1e-6)
