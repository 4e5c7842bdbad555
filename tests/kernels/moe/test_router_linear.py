"""Router GEMM in bf16 against fp64: exact scores, gradients to sixteen bits."""

import pytest
import torch

from megatron_q3n.kernels.moe.router_linear import router_linear


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_scores_and_gradients_are_as_good_as_fp32(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator).to(device)
    x, weight = (random(3, 50, 96).bfloat16().requires_grad_(), random(24, 96).bfloat16().requires_grad_())
    scores = router_linear(x, weight)
    exact = [y.detach().double().requires_grad_() for y in (x, weight)]
    expected = exact[0] @ exact[1].T
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-4)
    upstream = random(3, 50, 24)
    # compared before rounding to bf16, which would hide an error of 2⁻¹⁶
    parts = torch.cat([upstream.bfloat16(), (upstream - upstream.bfloat16()).bfloat16()], -1)
    split_error = (parts.double().unflatten(-1, (2, 24)).sum(-2) - upstream.double()).abs().max()
    assert split_error < 2**-16 * upstream.abs().max()
    actual_gradients = torch.autograd.grad(scores, [x, weight], upstream)
    expected_gradients = torch.autograd.grad(expected, exact, upstream.double())
    for actual, reference in zip(actual_gradients, expected_gradients):
        assert (actual.double() - reference).norm() / reference.norm() < 2e-3  # bf16's own rounding
