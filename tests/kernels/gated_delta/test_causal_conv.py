"""Causal conv1d against torch's grouped conv1d, in fp64; packing and carried state against single documents."""

import torch
import torch.nn.functional as F

from megatron_q3n.kernels.gated_delta.causal_conv import causal_conv, next_conv_state
from megatron_q3n.packing import Packing


def test_equals_conv1d() -> None:
    x = torch.randn(2, 20, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    expected = F.conv1d(x.transpose(1, 2), weight[:, None], padding=3, groups=6)[..., :20].transpose(1, 2)
    actual = causal_conv(x, weight)
    torch.testing.assert_close(actual, F.silu(expected), rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(actual.sin().sum(), (x, weight)),
        torch.autograd.grad(F.silu(expected).sin().sum(), (x, weight)),
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_carried_state() -> None:
    x, weight = torch.randn(2, 20, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    for cut in (1, 2, 7):
        state = next_conv_state(x[:, :cut], 4)
        continuation = causal_conv(x[:, cut:], weight, initial_state_DCK=state)
        torch.testing.assert_close(continuation, causal_conv(x, weight)[:, cut:], rtol=0, atol=1e-12)


def test_packed_documents_equal_single_ones() -> None:
    x, weight = torch.randn(1, 20, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    packing = Packing.of([0, 2, 9, 9, 20])
    for state in (None, torch.randn(4, 6, 3, dtype=torch.float64)):
        packed = causal_conv(x, weight, initial_state_DCK=state, packing=packing)
        after = next_conv_state(x, 4, initial_state_DCK=state, packing=packing)
        for d, (start, end) in enumerate(packing.spans):
            before = None if state is None else state[d : d + 1]
            document = x[:, start:end]
            if end > start:
                alone = causal_conv(document, weight, initial_state_DCK=before)
                torch.testing.assert_close(packed[:, start:end], alone, rtol=0, atol=1e-12)
            expected = next_conv_state(document, 4, initial_state_DCK=before)
            torch.testing.assert_close(after[d : d + 1], expected, rtol=0, atol=0)
