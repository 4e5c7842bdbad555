"""Grouped linear layer against one product per row; experts without tokens included."""

import torch

from megatron_q3n.kernels.moe.grouped_linear import clear_if_not_accumulated, grouped_linear, mark_overwrite


def test_rows_use_their_own_expert() -> None:
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


def test_an_outdated_main_gradient_is_never_accumulated() -> None:
    """A path that only accumulates clears it first; `clear_if_not_accumulated` clears that of an unused weight."""
    weight = torch.nn.Parameter(torch.randn(2, 3, 4))
    for use in (True, False):
        weight.main_grad = torch.full_like(weight, 7.0)
        mark_overwrite([weight])
        if use:
            grouped_linear(torch.randn(5, 4), weight, torch.tensor([2, 3]))
        else:
            clear_if_not_accumulated(weight)
        assert not weight.main_grad.any()
        weight.main_grad += 1
        # it is this step's gradient, which a second call must not clear
        clear_if_not_accumulated(weight)
        assert weight.main_grad.eq(1).all()
