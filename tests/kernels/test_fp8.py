"""FP8 rows and weights keep what e4m3 can, weight gradients find their rows, and FP8 experts are experts.

Triton's interpreter cuts numbers off where a GPU rounds them, so its errors are twice as large. Training
curves in FP8 against bf16 are not covered here (tools/bench.py, tools/benchmark/LOG.md).
"""

import pytest
import torch
from torch import Tensor

from megatron_q3n.kernels.permutation import Routes

# e4m3 has three fraction bits: relative errors spread evenly up to 2⁻⁴ when rounded
ROUNDED, CUT = 0.03, 0.075


def normal(seed: int, *shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_keeps(narrow: Tensor, scale: Tensor, exact: Tensor) -> None:
    error = (
        narrow.float() * (scale[..., None] if scale.dim() else scale) - exact
    ).norm() / exact.norm()
    assert error < (ROUNDED if narrow.is_cuda else CUT)
    assert narrow.float().abs().amax(-1).gt(400).all(), (
        "a row (or matrix) does not use the format's range"
    )


def routed(device: str, tokens: int, experts: int, topk: int) -> tuple[Routes, Tensor]:
    from megatron_q3n.kernels.permutation import plan_routes

    logits = normal(1, tokens, experts, device=device)
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    chosen.scatter_(1, logits.topk(topk, 1).indices, True)
    return plan_routes(chosen, logits.sigmoid() * chosen, topk, fused=False)


def test_rows_are_quantised_where_they_are_made(triton_device: str) -> None:
    from megatron_q3n.kernels.fused import fp8_rows
    from megatron_q3n.kernels.weighted_swiglu import weighted_swiglu

    routes, gates = routed(triton_device, 37, 6, 2)
    x = normal(2, 37, 48, device=triton_device)
    narrow, scale, rows = fp8_rows.scatter_quantised(x, routes.row_TK.int(), copy=True)
    assert_keeps(narrow, scale, x[routes.token_R])
    assert rows is not None
    assert rows.equal(x[routes.token_R])
    gate_up = normal(3, 74, 48, device=triton_device).requires_grad_()
    exact = weighted_swiglu(gate_up, gates, fused=False)
    out, narrow, scale = fp8_rows.swiglu_quantised(gate_up.detach(), gates)
    torch.testing.assert_close(out, exact.detach(), rtol=1e-4, atol=1e-5)
    assert_keeps(narrow, scale, out)
    upstream = normal(4, 74, 24, device=triton_device)
    wanted = torch.autograd.grad(exact, gate_up, upstream)[0]
    dgate_up, narrow, scale, _ = fp8_rows.swiglu_backward_quantised(
        gate_up.detach(), gates, upstream
    )
    torch.testing.assert_close(dgate_up, wanted, rtol=1e-4, atol=1e-5)
    assert_keeps(narrow, scale, wanted)


def test_weights_are_quantised_both_ways(triton_device: str) -> None:
    from megatron_q3n.kernels.fused import fp8_rows

    weight = normal(1, 3, 72, 40, device=triton_device)
    weight *= torch.tensor([1e-3, 1.0, 50.0], device=triton_device)[:, None, None]
    straight, turned, scale = fp8_rows.quantise_both_ways(weight)
    for expert in range(3):
        wanted = weight[expert].flatten()
        assert_keeps(straight[expert].flatten(), scale[expert], wanted)
        assert_keeps(turned[expert].T.flatten(), scale[expert], wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("sorted_already", [False, True])
def test_fp8_experts_are_bf16_experts_to_a_few_percent(sorted_already: bool) -> None:
    from megatron_q3n.kernels.fp8_experts import fp8_experts
    from megatron_q3n.kernels.grouped_linear import grouped_linear
    from megatron_q3n.kernels.permutation import gather_rows, scatter_rows
    from megatron_q3n.kernels.weighted_swiglu import weighted_swiglu

    bf16 = torch.bfloat16
    routes, gates = routed("cuda", 300, 8, 2)
    routes = Routes(
        routes.row_TK.int(), routes.expert_TK.int(), routes.token_R.int(), routes.rows_per_expert_E
    )
    x = normal(2, 600 if sorted_already else 300, 256, device="cuda", dtype=bf16)
    fc1 = normal(3, 8, 128, 256, device="cuda", dtype=bf16) / 16
    fc2 = normal(4, 8, 256, 64, device="cuda", dtype=bf16) / 8
    leaves = [y.detach().requires_grad_() for y in (x, gates, fc1, fc2)]
    counts = routes.rows_per_expert_E
    rows = leaves[0] if sorted_already else scatter_rows(leaves[0], routes, fused=False)
    hidden = weighted_swiglu(grouped_linear(rows, leaves[2], counts), leaves[1], fused=False)
    wanted = grouped_linear(hidden, leaves[3], counts)
    if not sorted_already:
        wanted = gather_rows(wanted, routes, fused=False)
    found = fp8_experts(*leaves, None if sorted_already else routes, counts, checking=True)
    upstream = normal(5, *wanted.shape, device="cuda", dtype=bf16)
    for ours, reference in zip(
        [found, *torch.autograd.grad(found, leaves, upstream)],
        [wanted, *torch.autograd.grad(wanted, leaves, upstream)],
        strict=True,
    ):
        assert (ours - reference).float().norm() / reference.float().norm() < 0.1


@pytest.mark.gpu
def test_an_evaluation_sees_the_weights_of_now() -> None:
    """A step keeps its FP8 copies until the next; an evaluation between them must not take the old ones."""
    from megatron_q3n.kernels.fp8_experts import fp8_experts

    bf16 = torch.bfloat16
    x = normal(1, 128, 128, device="cuda", dtype=bf16)
    fc1 = normal(2, 2, 256, 128, device="cuda", dtype=bf16).requires_grad_()
    fc2 = normal(3, 2, 128, 128, device="cuda", dtype=bf16).requires_grad_()
    gates, counts = torch.ones(128, device="cuda"), torch.tensor([64, 64], device="cuda")
    trained = fp8_experts(x, gates, fc1, fc2, None, counts, checking=True).detach()
    with torch.no_grad():
        fc2 *= 2
        evaluated = fp8_experts(x, gates, fc1, fc2, None, counts, checking=True)
    assert evaluated.equal(2 * trained)
