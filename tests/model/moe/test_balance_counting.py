"""Tokens that count in the balance losses: all but padding, and as a mean whatever the mask of the loss leaves."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_q3n.config import UserError, validate

MODEL: dict[str, Any] = {
    "mixer_pattern": "*",
    "num_layers": 1,
    "mtp_num_layers": 1,
    "moe_aux_loss_coeff": 0.5,
    "moe_z_loss_coeff": 0.1,
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.01,
}


def state_of(alone: Any, length: int, **model: Any) -> Any:
    """Build a state with fixed weights and an uneven expert load of the previous batch."""
    from megatron_q3n.model.moe.router import routers_of
    from megatron_q3n.training.state import build_state

    training = {"micro_batch_size": 1, "global_batch_size": 1, "sequence_length": length}
    state = build_state(validate({"model": MODEL | model, "training": training}), *alone)
    weights = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in state.models[0].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=weights) * 0.05)
        for router in routers_of(state.models).values():
            router.expert_load.copy_(torch.arange(8) / 28)
    return state


def routers_after(state: Any, batch: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Run a step that changes no weight; return its report, the routers' gradients, and their biases."""
    from megatron_q3n.model.moe.router import routers_of
    from tests.model.test_packing import gradients_of

    report, gradients = gradients_of(state, [batch])
    routers = routers_of(state.models)
    return (
        report,
        {name: gradient for name, gradient in gradients.items() if name.endswith("router.weight")},
        {name: router.expert_bias.clone() for name, router in routers.items()},
    )


@pytest.mark.parametrize("kind", ["global_aux_loss", "aux_loss"])
def test_padding_does_not_count(alone: Any, kind: str) -> None:
    """One conversation in rows of 16, 64 and 256: equal balance, bias and gradients of the routers."""
    from megatron_q3n.data.conversations import TokenizedConversation
    from megatron_q3n.data.sft_packing import pack

    tokens = np.random.default_rng(1).integers(1, 512, 17)
    conversation = TokenizedConversation(tokens, np.ones(17, np.float32))
    results = [
        routers_after(state_of(alone, length, moe_router_load_balancing_type=kind), pack([conversation], length, 1, 0))
        for length in (16, 64, 256)
    ]
    (exact, gradients, biases), *padded = results
    assert len(set(exact.expert_load["layer 0"])) > 1, "an even load would show nothing"
    for report, found_gradients, found_biases in padded:
        assert report.expert_load["layer 0"] == pytest.approx(exact.expert_load["layer 0"], abs=1e-7)
        assert report.balance_losses == pytest.approx(exact.balance_losses, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-3, atol=1e-7)
        for name, bias in biases.items():
            torch.testing.assert_close(found_biases[name], bias)


def test_balance_gradient_does_not_depend_on_the_mask(alone: Any) -> None:
    """64 tokens with 64, 32, 8, 1 of them in the loss: the gradient of the balance and z-losses stays that of a mean.

    The language model's part of the gradient is subtracted: it is measured without the balance losses.
    """
    from megatron_q3n.data.batch import causal_batch

    tokens = torch.randint(1, 512, (1, 65), generator=torch.Generator().manual_seed(3))
    found = []
    for counted in (64, 32, 8, 1):
        mask = torch.zeros(1, 64)
        mask[0, :counted] = 1
        batch = causal_batch(tokens[:, :-1], tokens[:, 1:].contiguous(), mask)
        _, both, _ = routers_after(state_of(alone, 64), batch)
        _, language, _ = routers_after(state_of(alone, 64, moe_aux_loss_coeff=0.0, moe_z_loss_coeff=0.0), batch)
        found.append({name: both[name] - language[name] for name in both if not name.startswith("mtp")})
    for gradients in found[1:]:
        for name, gradient in gradients.items():
            assert gradient.norm() > 1e-4
            torch.testing.assert_close(gradient, found[0][name], rtol=1e-3, atol=1e-6)


def test_packing_knows_its_padding() -> None:
    """A document padded for context parallelism, and the row's end; each rank has its own part of the mask."""
    from megatron_q3n.packing import Packing

    packing = Packing.of([0, 8, 16, 20], used_lengths=[5, 8, 0])
    row = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1] + [0] * 8 + [1] * 4).bool()
    mask = packing.padding_mask(1, 0)
    assert mask is not None
    assert mask.tolist() == row.tolist()
    assert packing.num_used_tokens == 13
    parts = [packing.padding_mask(2, rank) for rank in range(2)]
    for part, indices in zip(parts, packing.zigzag(2)):
        assert part is not None
        assert part.tolist() == row[indices].tolist()
    assert Packing.of([0, 8, 16]).padding_mask(1, 0) is None
    with pytest.raises(ValueError, match="cannot use"):
        Packing.of([0, 8], used_lengths=[9])


def test_aligned_documents_know_their_padding() -> None:
    from megatron_q3n.data.batch import packed_batch

    text = torch.tensor([[5, 6, 0, 7, 8, 9, 4, 0, 3, 2]])
    batch = packed_batch(text, text, torch.ones(1, 10), eod=0, alignment=2)
    # 5 6 0 _ | 7 8 9 4 0 _ : the last tokens no longer fit
    assert batch.packing is not None
    assert (batch.packing.lengths, batch.packing.used_lengths) == ((4, 6), (3, 5))
    assert batch.num_used_tokens == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"stage": "sft", "sft": {"train": [{"task": {"name": "chain_sum"}}]}},
        {"stage": "pretrain", "data": {"mask_document_boundaries": True}},
    ],
    ids=["sft", "documents"],
)
def test_balance_in_a_sequence_is_refused_for_packed_rows(settings: dict[str, Any]) -> None:
    training = {"micro_batch_size": 1, "global_batch_size": 1}
    model = {"moe_router_load_balancing_type": "seq_aux_loss"}
    with pytest.raises(UserError, match="seq_aux_loss balances each row as one sequence"):
        validate(settings | {"model": model, "training": training})
    validate(settings | {"model": {"moe_router_load_balancing_type": "aux_loss"}, "training": training})
