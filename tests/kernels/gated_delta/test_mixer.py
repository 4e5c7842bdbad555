"""The fused mixer against the composed one, gradients included; and that it keeps no graph where nobody trains."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_q3n.kernels.gated_delta.delta_rule import chunk_gated_delta_rule
from megatron_q3n.kernels.gated_delta.mixer import DeltaHeads, DeltaWeights, composed_delta_mixer, fused_delta_mixer

HEADS = DeltaHeads(key_heads=2, value_heads=4, key_dim=16, value_dim=16, eps=1e-6)


@pytest.fixture
def operands(triton_device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(37, 2, sum(HEADS.sections)), (37, 2, 8), (128, 4), (4,), (4,), (16,)]
    return [torch.randn(*s, generator=generator).to(triton_device) for s in shapes]


def mix(mixer: Any, rule: Any, qkvz: Tensor, beta_alpha: Tensor, *vectors: Tensor) -> Tensor:
    return mixer(qkvz, beta_alpha, DeltaWeights(*vectors), HEADS, rule)


def test_fused_is_composed(operands: list[Tensor]) -> None:
    results = []
    for mixer in (composed_delta_mixer, fused_delta_mixer):
        leaves = [x.clone().requires_grad_() for x in operands]
        output = mix(mixer, chunk_gated_delta_rule, *leaves)
        upstream = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
        results.append([output, *torch.autograd.grad(output, leaves, upstream)])
    for wanted, got in zip(*results, strict=True):
        assert (got - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("trains", [True, False])
def test_the_rule_keeps_a_graph_only_in_training(trains: bool, operands: list[Tensor]) -> None:
    """Parameters want gradients always; an evaluation must not pay for the rule's."""
    kept = []

    def rule(*inputs: Tensor, **options: Any) -> Any:
        output, state = chunk_gated_delta_rule(*inputs, **options)
        kept.append(output.requires_grad)
        return output, state

    with torch.set_grad_enabled(trains):
        run = partial(mix, fused_delta_mixer, rule)
        run(*(x.requires_grad_() for x in operands))
    assert kept == [trains]
