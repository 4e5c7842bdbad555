"""Packed documents give the losses and gradients of single documents, MTP included, without the balance loss.

One process, on every backend. Packing under other layouts: tests/tools/layouts. The same tokens run as one document
exceed every tolerance, so the tolerances detect attention or state that leaks between documents. In bf16 every token is
routed to every expert, since rounding would change the routing of some.
"""

import itertools
from itertools import pairwise
from typing import Any

import pytest
import torch

from megatron_q3n.packing import Packing
from tests.backends import MODEL, Backend

LENGTHS = [5, 40, 1, 66]
# of losses, of each gradient
TOLERANCES = {"fp32": (1e-5, 1e-5), "bf16": (2e-3, 0.1)}
# Their gradients are small sums of large terms, with a threefold tolerance except in fp32 on a CPU.
GATES = ("A_log", "dt_bias")


def batch_of(lengths: list[int], tokens: torch.Tensor) -> Any:
    """Pack the tokens into documents of these lengths; the last token of each has no target."""
    from megatron_q3n.data.batch import Batch

    packing = Packing.of([0, *itertools.accumulate(lengths)])
    mask = torch.ones(1, sum(lengths))
    mask[0, [end - 1 for _, end in packing.spans]] = 0
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = torch.roll(tokens, -1, 1)
    return Batch(tokens, labels, mask, positions, packing)


def row_of(tokens: torch.Tensor) -> Any:
    """Return one document as a row without packing."""
    from megatron_q3n.data.batch import causal_batch

    mask = torch.ones(1, tokens.shape[1])
    mask[0, -1] = 0
    return causal_batch(tokens, torch.roll(tokens, -1, 1), mask)


def set_weights(model: Any) -> None:
    """Set weights far from their initialization."""
    weights = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                # with complete decay at every token its gradient would be rounding noise
                parameter.fill_(-2.0)
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=weights) * 0.06)


def gradients_of(state: Any, batches: list[Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Run a step that changes no weight; return its report and every gradient."""
    from megatron_q3n.training.step import train_step

    state.optimizer.step = lambda: (True, None, None)
    report = train_step(state, batches)
    return report, {n: p.main_grad.clone() for n, p in state.models[0].named_parameters()}


def errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return each gradient's relative error."""
    return {name: ((actual[name] - x).norm() / x.norm().clamp(min=1e-12)).item() for name, x in expected.items()}


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
    packed_errors, leaking_errors = errors(packed, single), errors(leaking, single)
    worst = max(packed_errors, key=packed_errors.__getitem__)
    print(f"loss off by {together.loss / apart.loss - 1:.1e}, gradient by {packed_errors[worst]:.1e}, {worst}")
    is_cpu_fp32 = state.device.torch_device.type == "cpu" and backend.compute == "fp32"
    for name, error in packed_errors.items():
        slack = 3 if name.endswith(GATES) and not is_cpu_fp32 else 1
        assert error < slack * gradient_tolerance, f"{name}: gradient off by {error:.1e}"
        assert leaking_errors[name] > slack * gradient_tolerance, f"{name}: a leak of {leaking_errors[name]:.1e} hides"
