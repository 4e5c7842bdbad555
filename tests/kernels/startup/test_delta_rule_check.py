"""Check of the delta rule's backend: it detects a wrong result, a wrong gradient and mixed documents.

The fused kernel itself is checked on a GPU, at every start of a run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_q3n.kernels.gated_delta.delta_rule import chunk_gated_delta_rule
from megatron_q3n.kernels.startup.delta_rule_check import check_delta_rule, gradient_error
from megatron_q3n.kernels.startup.delta_rule_problems import DeltaRuleProblem
from megatron_q3n.packing import Packing

CPU = torch.device("cpu")
ROWS = DeltaRuleProblem(2, 70, 1, 2, 8, 8)
DOCUMENTS = DeltaRuleProblem(1, 70, 1, 2, 8, 8, (0, 1, 40, 70))


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return 1.1 * gradient


def wrong_by(change: Callable[[Tensor], Tensor], *inputs: Tensor, **options: Any) -> Any:
    """Run the rule with its decay changed."""
    q, k, v, g, beta = inputs
    return chunk_gated_delta_rule(q, k, v, change(g), beta, **options)


@pytest.mark.parametrize("problem", [ROWS, DOCUMENTS], ids=str)
def test_other_chunk_sizes_pass_and_faults_are_detected(problem: DeltaRuleProblem) -> None:
    error = partial(gradient_error, problem=problem, device=CPU, dtype=torch.float32)
    assert error(partial(chunk_gated_delta_rule, chunk_size=16)) < 1e-4
    assert error(partial(wrong_by, lambda g: 1.1 * g)) > 0.02
    assert error(partial(wrong_by, _WrongGradient.apply)) > 0.02


def test_mixed_documents_are_detected() -> None:
    def one_document(*inputs: Tensor, packing: Packing, **options: Any) -> Any:
        return chunk_gated_delta_rule(*inputs, packing=Packing.of((0, packing.num_tokens)), **options)

    assert gradient_error(one_document, DOCUMENTS, CPU, torch.float32) > 0.02


def test_a_cpu_gets_the_reference() -> None:
    assert check_delta_rule(CPU, torch.bfloat16, [ROWS]).startswith("torch: chunked reference")
