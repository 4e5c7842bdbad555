"""The router's product in bf16 keeps what fp32 would: scores exactly, gradients to sixteen bits."""

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
    wanted = exact[0] @ exact[1].T
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-5, atol=1e-4)
    upstream = random(3, 50, 24)
    # compared before they are rounded to bf16, where an error of 2⁻¹⁶ could not be seen
    parts = torch.cat([upstream.bfloat16(), (upstream - upstream.bfloat16()).bfloat16()], -1)
    split_error = (parts.double().unflatten(-1, (2, 24)).sum(-2) - upstream.double()).abs().max()
    assert split_error < 2**-16 * upstream.abs().max()
    got = torch.autograd.grad(scores, [x, weight], upstream)
    want = torch.autograd.grad(wanted, exact, upstream.double())
    for ours, reference in zip(got, want):
        assert (ours.double() - reference).norm() / reference.norm() < 2e-3  # bf16's own rounding
