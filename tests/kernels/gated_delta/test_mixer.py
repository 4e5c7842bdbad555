"""Fused mixer against its reference, gradients included; without gradients it keeps no autograd graph."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_q3n.kernels.gated_delta.delta_rule import chunk_gated_delta_rule
from megatron_q3n.kernels.gated_delta.mixer import delta_mixer_reference, fused_delta_mixer
from megatron_q3n.kernels.gated_delta.operands import DeltaHeads, DeltaWeights

HEADS = DeltaHeads(key_heads=2, value_heads=4, key_dim=16, value_dim=16, eps=1e-6)


@pytest.fixture
def operands(triton_device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(37, 2, sum(HEADS.sections)), (37, 2, 8), (128, 4), (4,), (4,), (16,)]
    return [torch.randn(*s, generator=generator).to(triton_device) for s in shapes]


def mix(mixer: Any, rule: Any, qkvz: Tensor, beta_alpha: Tensor, *vectors: Tensor) -> Tensor:
    return mixer(qkvz, beta_alpha, DeltaWeights(*vectors), HEADS, rule)


def test_fused_equals_reference(operands: list[Tensor]) -> None:
    results = []
    for mixer in (delta_mixer_reference, fused_delta_mixer):
        leaves = [x.clone().requires_grad_() for x in operands]
        output = mix(mixer, chunk_gated_delta_rule, *leaves)
        upstream = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
        results.append([output, *torch.autograd.grad(output, leaves, upstream)])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("with_gradients", [True, False])
def test_the_rule_has_a_graph_only_in_training(with_gradients: bool, operands: list[Tensor]) -> None:
    """Parameters always require gradients; an evaluation must not keep the rule's graph."""
    has_graph = []

    def rule(*inputs: Tensor, **options: Any) -> Any:
        output, state = chunk_gated_delta_rule(*inputs, **options)
        has_graph.append(output.requires_grad)
        return output, state

    with torch.set_grad_enabled(with_gradients):
        run = partial(mix, fused_delta_mixer, rule)
        run(*(x.requires_grad_() for x in operands))
    assert has_graph == [with_gradients]
