"""Weight decay by its explicit rule, on the real model and through real optimizer steps; the
learning rate by its formula.
"""

import math
from typing import Any

import pytest
import torch

from megatron_q3n.config import validate

STEPS = 60  # of decay by a twentieth each: a twentieth is left


@pytest.fixture
def state(alone: Any) -> Any:
    """A freshly built tiny model in training: weight decay 0.5, learning rate constant at 0.1."""
    return built(alone, {"optimizer": {"weight_decay": 0.5}})


def built(alone: Any, settings: dict[str, Any]) -> Any:
    from megatron_q3n.training.state import build_state

    schedule = {"style": "constant", "lr": 0.1, "min_lr": 0.0, "warmup_steps": 0}
    return build_state(validate({"schedule": schedule} | settings), *alone)


def decay_only(state: Any) -> dict[str, torch.Tensor]:
    """Take optimizer steps on zero gradients; return what each parameter was before."""
    with torch.no_grad():
        for parameter in state.models[0].parameters():
            parameter.add_(0.25)  # away from zero, where decay would show nothing
    before = {name: p.detach().clone() for name, p in state.models[0].named_parameters()}
    for _ in range(STEPS):
        state.chunks[0].zero_grad_buffer()
        state.optimizer.step()
    return before


def test_norm_weights_shrink_and_gates_do_not_move(state: Any) -> None:
    before = decay_only(state)
    factor = (1 - 0.1 * 0.5) ** STEPS
    norms = 0
    for name, parameter in state.models[0].named_parameters():
        kept = name.endswith(("A_log", "dt_bias"))
        norms += "norm" in name
        expected = before[name] * (1.0 if kept else factor)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=0, msg=name)
    # 8 sublayer norms, 3 GDN output norms, q and k twice (one in MTP), final; MTP: 2 sublayers, enorm, hnorm, final
    assert norms == 8 + 3 + 2 + 1 + (2 + 2 + 3)


@torch.no_grad()
def test_every_decayed_norm_is_zero_centered(state: Any) -> None:
    """Tested by its output, not by its attributes: with weight -1 it is 0, with weight 0 it only normalizes."""
    from megatron_q3n.training.optimizer import NORM_WEIGHTS

    model, num_norms = state.models[0], 0
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert name.endswith(NORM_WEIGHTS), name
            norm = model.get_submodule(name.removesuffix(".weight"))
            x = torch.randn(3, *parameter.shape)
            parameter.fill_(-1)
            assert (norm(x) == 0).all(), name
            parameter.fill_(0)
            torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3), msg=name)
            num_norms += 1
    assert num_norms == 21


def test_a_norm_that_is_a_plain_scale_is_not_decayed(alone: Any, state: Any) -> None:
    from megatron_q3n.training.optimizer import build_optimizer

    model = state.models[0]
    model.decoder.layers[2].input_layernorm = torch.nn.RMSNorm(128)
    with pytest.raises(AssertionError, match=r"layers.2.input_layernorm.weight belongs to a RMSNorm"):
        build_optimizer(state.chunks, state.config)


def test_norm_decay_can_be_switched_off(alone: Any) -> None:
    state = built(alone, {"optimizer": {"weight_decay": 0.5, "decay_norm_weights": False}})
    before = decay_only(state)
    for name, parameter in state.models[0].named_parameters():
        moved = not torch.equal(parameter.detach(), before[name])
        assert moved == (parameter.dim() >= 2), name


def test_a_vector_without_a_rule_is_refused() -> None:
    from megatron_q3n.training.optimizer import decays

    with pytest.raises(AssertionError, match="no decay rule"):
        decays(torch.zeros(3), "decoder.layers.0.mlp.new_bias", decay_norm_weights=True)


def test_decay_table_lists_every_parameter(state: Any) -> None:
    from megatron_q3n.training.optimizer import decay_table

    table = decay_table(state.models, state.config)
    for name, _ in state.models[0].named_parameters():
        assert name in table
    decay = {line.split()[-1]: float(line.split()[0]) for line in table.splitlines()[1:]}
    undecayed = {name for name, value in decay.items() if value == 0}
    layers = [f"decoder.layers.{layer}.self_attention." for layer in (0, 2, 4)]
    assert undecayed == {f"{layer}{name}" for layer in layers for name in ("A_log", "dt_bias")}
    assert set(decay.values()) == {0, 0.5}
    assert "0      (8,)                   decoder.layers.0.self_attention.A_log" in table
    assert "0.5    (128,)                 decoder.final_norm.weight" in table


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"style": "constant"}, lambda step: 1.0),
        ({"style": "cosine"}, lambda step: 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 10) / 90))),
        (
            {"style": "wsd", "decay_steps": 20, "wsd_decay_style": "linear"},
            lambda step: 1.0 if step <= 80 else 1 - 0.9 * (step - 80) / 20,
        ),
        (
            {"style": "wsd", "decay_steps": 0.2, "wsd_decay_style": "linear"},
            lambda step: 1.0 if step <= 80 else 1 - 0.9 * (step - 80) / 20,
        ),
    ],
    ids=["constant", "cosine", "wsd", "wsd-share"],
)
def test_learning_rate_follows_its_formula(alone: Any, schedule: dict[str, Any], expected: Any) -> None:
    """`step` finished steps: the rate of the next one. Warm-up is linear and its first step already learns."""
    from megatron_q3n.training.optimizer import learning_rate

    settings = {"lr": 1.0, "min_lr": 0.1, "warmup_steps": 10} | schedule
    state = built(alone, {"schedule": settings, "training": {"steps": 100}})
    for step in (0, 1, 5, 10, 11, 50, 80, 90, 99):
        state.set_step(step)
        rate = 1 / 11 + (1 - 1 / 11) * step / 10 if step < 10 else expected(step)
        assert learning_rate(state.optimizer) == pytest.approx(rate, rel=1e-6), step
