"""Losses of MTP training for drafting: scheduled sampling, masks, and which parameters get a gradient.

The logits against decoding: test_draft_chain.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_q3n.config.mtp import MtpConfig
from tests.inference.tiny_model import random_prompts, tiny_model
from tests.model.mtp.test_draft_chain import DEPTHS, train_forward

TOKENS = torch.tensor(random_prompts([32, 32], 64, seed=6))


@pytest.fixture(scope="module")
def model(alone: Any) -> Any:
    # without the load-balancing loss, whose gradient always reaches the trunk
    return tiny_model(alone, mtp_num_layers=DEPTHS, mtp_use_repeated_layer=True, moe_aux_loss_coeff=0)


def settings(**changes: Any) -> MtpConfig:
    return MtpConfig.model_validate({"method": "inference", **changes})


def losses(model: Any, **changes: Any) -> Tensor:
    """Return each depth's mean loss."""
    train_forward(model, settings(**changes), TOKENS)
    totals = model.config.pass_state.mtp.pop_totals()
    return totals[:, 0] / totals[:, 1]


def gradients(model: Any, **changes: Any) -> dict[str, float]:
    """Return the largest gradient of the MTP layer and of the trunk, from the MTP losses only."""
    model.zero_grad()
    output = train_forward(model, settings(**changes), TOKENS)
    (output.sum() * 0).backward()
    largest = {"mtp": 0.0, "trunk": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = "mtp" if name.startswith("mtp.") else "trunk"
            largest[part] = max(largest[part], parameter.grad.abs().max().item())
    model.zero_grad()
    return largest


def test_gradient_stays_in_the_mtp_layer_when_detached(model: Any) -> None:
    trained, detached = gradients(model), gradients(model, trunk="detached")
    assert trained["mtp"] > 0
    assert trained["trunk"] > 0
    assert detached["mtp"] > 0
    assert detached["trunk"] == 0


def test_fed_drafts_change_every_depth_but_the_first(model: Any) -> None:
    text = losses(model, scheduled_sampling_end=0.0)
    own = losses(model, scheduled_sampling_start=1.0, after_wrong_draft="teacher_forcing")
    assert own[0] == pytest.approx(text[0].item(), abs=1e-6)
    assert ((own[1:] - text[1:]).abs() > 1e-3).all()


def test_schedule_changes_the_scheduled_sampling_probability(alone: Any) -> None:
    from megatron_q3n.model.mtp.accumulators import MTPLosses

    mtp_losses = MTPLosses(DEPTHS, settings(scheduled_sampling_start=0.2, scheduled_sampling_end=0.8), total_steps=5)
    probabilities = []
    for step in range(6):
        mtp_losses.set_step(step)
        probabilities.append(mtp_losses.own_draft_probability.item())
    assert probabilities == pytest.approx([0.2, 0.35, 0.5, 0.65, 0.8, 0.8])


def test_successors_of_wrong_drafts_can_be_masked(model: Any) -> None:
    """Drafts of random text are almost never right, so nearly everything after a draft is masked."""
    text = losses(model, scheduled_sampling_start=1.0, after_wrong_draft="teacher_forcing")
    masked = losses(model, scheduled_sampling_start=1.0)
    assert masked[0] == pytest.approx(text[0].item(), abs=1e-6)
    assert (masked[1:] < 0.2 * text[1:]).all()


def test_distillation_towards_the_model_itself(model: Any) -> None:
    """The divergence at depth 1, computed from the two sets of logits."""
    heads: list[Tensor] = []
    hook = model.output_layer.register_forward_hook(lambda *call: heads.append(call[2][0].detach().clone()))
    divergences = losses(model, label_weight=0.0, distillation_weight=2.0, scheduled_sampling_end=0.0)
    hook.remove()
    target_SBV, drafts_SBV = heads[0][1:], heads[1][:-1]
    p, log_q = target_SBV.softmax(-1), drafts_SBV.log_softmax(-1)
    expected = (p * (target_SBV.log_softmax(-1) - log_q)).sum(-1).mean()
    assert divergences[0].item() == pytest.approx(2 * expected.item(), rel=1e-4)


def test_depth_weights_are_normalized(alone: Any) -> None:
    from megatron_q3n.model.mtp.accumulators import MTPLosses

    mtp_losses = MTPLosses(DEPTHS, settings(depth_weights=[4.0, 3.0, 2.0, 1.0]))
    mask = torch.ones(1, 8)
    scales = [mtp_losses.scale(depth, mask.sum(), mask).item() for depth in range(DEPTHS)]
    assert scales == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_recomputing_gives_the_same_gradients(model: Any) -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    before = {name: getattr(model.config, name) for name in full}
    try:
        for name, value in full.items():
            setattr(model.config, name, value)
        recomputed = gradients(model, scheduled_sampling_start=0.5)
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
    assert recomputed == pytest.approx(gradients(model, scheduled_sampling_start=0.5), rel=1e-5)
