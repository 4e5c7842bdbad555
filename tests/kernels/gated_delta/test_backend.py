"""The check that chooses the delta rule's backend: it sees a wrong result, a wrong gradient and a mixed-up document.

The fused kernel itself is checked where there is a GPU, by every start of a run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_q3n.kernels.gated_delta.backend import choose, gradient_error
from megatron_q3n.kernels.gated_delta.delta_rule import chunk_gated_delta_rule
from megatron_q3n.kernels.startup.delta_rule_problems import DeltaRuleProblem

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
def test_the_same_rule_in_other_chunks_is_right_and_faults_are_seen(problem: DeltaRuleProblem) -> None:
    error = partial(gradient_error, problem=problem, device=CPU, dtype=torch.float32)
    assert error(partial(chunk_gated_delta_rule, chunk_size=16)) < 1e-4
    assert error(partial(wrong_by, lambda g: 1.1 * g)) > 0.02
    assert error(partial(wrong_by, _WrongGradient.apply)) > 0.02


def test_documents_that_see_each_other_are_seen() -> None:
    def one_document(*inputs: Tensor, cu_seqlens: Tensor, **options: Any) -> Any:
        return chunk_gated_delta_rule(*inputs, cu_seqlens=cu_seqlens[[0, -1]], **options)

    assert gradient_error(one_document, DOCUMENTS, CPU, torch.float32) > 0.02


def test_a_cpu_gets_the_reference() -> None:
    assert choose(CPU, torch.bfloat16, [ROWS]).startswith("torch: chunked reference")
