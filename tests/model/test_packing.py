"""Packed documents are the same documents run one by one: losses, and gradients through MTP too. Balance loss off.

fp32, one process, torch backend. Packing under other layouts: tests/layouts.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch

from megatron_q3n.config import validate

LENGTHS = [5, 40, 1, 66]


def batch_of(lengths: list[int], tokens: torch.Tensor) -> Any:
    """Pack the tokens into documents of these lengths; the last token of each asks nothing."""
    from megatron_q3n.data.batch import Batch

    bounds = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.ones(1, sum(lengths))
    mask[0, bounds[1:] - 1] = 0
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = torch.roll(tokens, -1, 1)
    return Batch(tokens, labels, mask, positions, bounds.to(torch.int32), max(lengths))


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_packed_documents_equal_single_ones(depths: int, alone: Any) -> None:
    from megatron_q3n.training.state import build_state
    from megatron_q3n.training.step import train_step

    model = {
        "mtp_num_layers": depths,
        "moe_aux_loss_coeff": 0.0,
        "moe_router_load_balancing_type": "none",
    }
    training = {"micro_batch_size": 1, "global_batch_size": 1, "sequence_length": 112}
    state = build_state(validate({"model": model, "training": training}), *alone)
    weights = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in state.models[0].named_parameters():
            if name.endswith("A_log"):
                parameter.fill_(
                    -2.0
                )  # forgetting all at once would make its gradient mere rounding
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=weights) * 0.06)
    tokens = torch.randint(1, 512, (1, sum(LENGTHS)), generator=weights)
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    packed = [batch_of(LENGTHS, tokens)]
    singles = [batch_of([end - start], tokens[:, start:end]) for start, end in pairwise(bounds)]

    results = []
    state.optimizer.step = lambda: (
        True,
        None,
        None,
    )  # keep weights and gradients for the second pass
    for batches in (packed, singles):
        report = train_step(state, batches)
        gradients = {n: p.main_grad.clone() for n, p in state.models[0].named_parameters()}
        results.append((report, gradients))
    (together, packed_grads), (apart, single_grads) = results
    assert together.loss == pytest.approx(apart.loss, rel=1e-5)
    assert together.mtp_losses == pytest.approx(apart.mtp_losses, rel=1e-5)
    for name, wanted in single_grads.items():
        error = (packed_grads[name] - wanted).norm() / wanted.norm().clamp(min=1e-12)
        assert error < 1e-5, f"{name}: gradient off by {error:.1e}"
