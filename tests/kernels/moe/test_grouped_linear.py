"""Grouped matrix products against one product per row; experts nobody chose included."""

import torch

from megatron_q3n.kernels.moe.grouped_linear import grouped_linear, mark_stale, settle


def test_each_row_meets_its_own_expert() -> None:
    counts = torch.tensor([3, 0, 5, 0])
    rows = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 7, 6, dtype=torch.float64, requires_grad=True)
    expert = torch.repeat_interleave(torch.arange(4), counts)
    by_row = torch.einsum("tk,tnk->tn", rows, weight[expert])
    ours = grouped_linear(rows, weight, counts)
    torch.testing.assert_close(ours, by_row, rtol=0, atol=1e-12)
    got = torch.autograd.grad(ours.sin().sum(), (rows, weight))
    for a, b in zip(got, torch.autograd.grad(by_row.sin().sum(), (rows, weight))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert got[1][1].abs().sum() == 0


def test_a_stale_main_gradient_is_never_added_to() -> None:
    """The path that only adds clears it first; what nobody used is cleared by `settle`."""
    weight = torch.nn.Parameter(torch.randn(2, 3, 4))
    for use in (True, False):
        weight.main_grad = torch.full_like(weight, 7.0)
        mark_stale([weight])
        if use:
            grouped_linear(torch.randn(5, 4), weight, torch.tensor([2, 3]))
        else:
            settle(weight)
        assert not weight.main_grad.any()
        weight.main_grad += 1
        settle(weight)  # settled once, it is this step's
        assert weight.main_grad.eq(1).all()
