"""Packed documents are the same documents run one by one: losses, and gradients through MTP too. Balance loss off.

One process, on every backend. Packing under other layouts: tests/layouts. That the tolerances tell packed
documents from leaking ones is shown beside: the same tokens run as one document miss every one of them.
In bf16 every expert takes every token, since rounding would send some elsewhere.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.backends import MODEL, Backend

LENGTHS = [5, 40, 1, 66]
TOLERANCES = {"fp32": (1e-5, 1e-5), "bf16": (2e-3, 0.1)}  # of losses, of each gradient
GATES = ("A_log", "dt_bias")  # their gradients are small sums of large terms: 3 times as much off a CPU


def batch_of(lengths: list[int], tokens: torch.Tensor) -> Any:
    """Pack the tokens into documents of these lengths; the last token of each asks nothing."""
    from megatron_q3n.data.batch import Batch

    bounds = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.ones(1, sum(lengths))
    mask[0, bounds[1:] - 1] = 0
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = torch.roll(tokens, -1, 1)
    return Batch(tokens, labels, mask, positions, bounds.to(torch.int32), max(lengths))


def row_of(tokens: torch.Tensor) -> Any:
    """Make one document a plain row, without any word of packing."""
    from megatron_q3n.data.batch import batch_of_rows

    mask = torch.ones(1, tokens.shape[1])
    mask[0, -1] = 0
    return batch_of_rows(tokens, torch.roll(tokens, -1, 1), mask)


def set_weights(model: Any) -> None:
    """Draw weights far from their init."""
    weights = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                # forgetting all at once would make its gradient mere rounding
                parameter.fill_(-2.0)
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=weights) * 0.06)


def gradients_of(state: Any, batches: list[Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Take a step that changes no weight; return its report and every gradient."""
    from megatron_q3n.training.step import train_step

    state.optimizer.step = lambda: (True, None, None)
    report = train_step(state, batches)
    return report, {n: p.main_grad.clone() for n, p in state.models[0].named_parameters()}


def errors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return each gradient's relative error."""
    return {name: ((found[name] - want).norm() / want.norm().clamp(min=1e-12)).item() for name, want in wanted.items()}


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_packed_documents_equal_single_ones(depths: int, backend: Backend) -> None:
    model = MODEL | {"mtp_num_layers": depths, "moe_aux_loss_coeff": 0.0, "moe_router_load_balancing_type": "none"}
    if backend.compute == "bf16":
        model |= {"moe_router_topk": 8}
    training = {"micro_batch_size": 1, "global_batch_size": 1, "sequence_length": 112}
    data = backend.config().data.model_dump() | {"mask_document_boundaries": True}
    state = backend.state({"model": model, "data": data, "training": training})
    set_weights(state.models[0])
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, MODEL["vocab_size"], (1, sum(LENGTHS)), generator=generator)
    documents = [tokens[:, a:b] for a, b in pairwise([0, *torch.tensor(LENGTHS).cumsum(0)])]
    together, packed = gradients_of(state, [batch_of(LENGTHS, tokens)])
    apart, single = gradients_of(state, [row_of(document) for document in documents])
    _, leaking = gradients_of(state, [row_of(tokens)])

    loss_tolerance, gradient_tolerance = TOLERANCES[backend.compute]
    assert together.loss == pytest.approx(apart.loss, rel=loss_tolerance)
    assert together.mtp_losses == pytest.approx(apart.mtp_losses, rel=loss_tolerance)
    found, leaks = errors(packed, single), errors(leaking, single)
    worst = max(found, key=found.__getitem__)
    print(f"loss off by {together.loss / apart.loss - 1:.1e}, gradient by {found[worst]:.1e}, {worst}")
    on_a_cpu = state.device.torch_device.type == "cpu" and backend.compute == "fp32"
    for name, error in found.items():
        slack = 3 if name.endswith(GATES) and not on_a_cpu else 1
        assert error < slack * gradient_tolerance, f"{name}: gradient off by {error:.1e}"
        assert leaks[name] > slack * gradient_tolerance, f"{name}: a leak of {leaks[name]:.1e} hides"
