"""Norms against their formulas, and their precision under bf16 inputs."""

import torch

from megatron_q3n.kernels.norms import gated_rms_norm, l2_norm, rms_norm


def test_rms_norm_is_zero_centered() -> None:
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    by_hand = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), by_hand, rtol=1e-12, atol=0)


def test_statistics_are_fp32_for_bf16_inputs() -> None:
    """bf16 holds 8 bits: a mean of squares in it would be off by percents."""
    x = (torch.randn(4, 4096) * 3).bfloat16()
    weight = torch.zeros(4096)
    exact = rms_norm(x.double(), weight.double(), 1e-6)
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() / exact.abs().clamp(min=1e-3)).max() < 2**-8
    gated = gated_rms_norm(x, torch.ones_like(x), weight, 1e-6)
    assert ((gated.double() - exact * 0.7310585786).abs() / exact.abs().clamp(min=1e-3)).max() < 2**-8


def test_l2_norm_has_its_eps_under_the_root() -> None:
    tiny = torch.full((1, 4), 1e-4, dtype=torch.float64)
    by_hand = tiny / (4e-8 + 1e-6) ** 0.5
    torch.testing.assert_close(l2_norm(tiny), by_hand, rtol=1e-12, atol=0)
