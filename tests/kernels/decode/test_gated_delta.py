"""Decode Gated DeltaNet step: against the whole rule over the same tokens, and the fused kernel against the reference.

Without a GPU the fused kernel runs in Triton's interpreter.
"""

import pytest
import torch
from torch import Tensor

from megatron_q3n.kernels.decode.gated_delta import decode_gated_delta, decode_gated_delta_reference
from megatron_q3n.kernels.gated_delta.delta_rule import chunk_gated_delta_rule
from megatron_q3n.kernels.gated_delta.mixer import delta_mixer_reference
from megatron_q3n.kernels.gated_delta.operands import DeltaHeads, DeltaWeights

HEADS = DeltaHeads(key_heads=2, value_heads=4, key_dim=16, value_dim=16, eps=1e-6)
CHANNELS, CONV_KERNEL_SIZE = sum(HEADS.sections[:3]), 4
# wide enough that two warps have a part of the columns each
WIDE_HEADS = DeltaHeads(key_heads=1, value_heads=4, key_dim=64, value_dim=64, eps=1e-6)
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(tokens: int, batch: int, dtype: torch.dtype, device: str = "cpu", heads: DeltaHeads = HEADS) -> tuple:
    dtype_acc = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = (2, heads.value_heads), (3, heads.value_heads), (4, heads.value_dim)
    weights = DeltaWeights(
        normal(1, sum(heads.sections[:3]), CONV_KERNEL_SIZE).to(device, dtype),
        *(normal(i, size).to(device, dtype_acc) for i, size in sizes),
    )
    qkvz = normal(5, tokens, batch, sum(heads.sections))
    ba = normal(6, tokens, batch, 2 * heads.value_heads)
    return qkvz.to(device, dtype), ba.to(device, dtype), weights


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("cut", [[9], [1] * 9, [4, 1, 4], [2, 3, 4]])
def test_steps_equal_the_whole_rule(cut: list[int]) -> None:
    dtype = torch.float64
    qkvz, ba, weights = problem(9, 3, dtype)
    expected = delta_mixer_reference(qkvz, ba, weights, HEADS, chunk_gated_delta_rule)
    conv = torch.zeros(3, CHANNELS, CONV_KERNEL_SIZE - 1, dtype=dtype)
    delta = torch.zeros(3, 4, 16, 16, dtype=dtype)
    outputs, start = [], 0
    for count in cut:
        step = slice(start, start + count)
        out, convs, deltas = decode_gated_delta_reference(qkvz[step], ba[step], weights, HEADS, conv, delta)
        conv, delta = convs[count - 1 :: count], deltas[count - 1 :: count]
        outputs.append(out)
        start += count
    assert_near(torch.cat(outputs), expected, dtype)


def test_states_after_each_token_are_those_of_shorter_calls() -> None:
    dtype = torch.float64
    qkvz, ba, weights = problem(5, 2, dtype)
    conv, delta = normal(7, 2, CHANNELS, CONV_KERNEL_SIZE - 1).to(dtype), normal(8, 2, 4, 16, 16).to(dtype)
    _, convs, deltas = decode_gated_delta_reference(qkvz, ba, weights, HEADS, conv, delta)
    for count in range(1, 6):
        _, short_conv, short_delta = decode_gated_delta_reference(qkvz[:count], ba[:count], weights, HEADS, conv, delta)
        assert_near(convs[count - 1 :: 5], short_conv[count - 1 :: count], dtype)
        assert_near(deltas[count - 1 :: 5], short_delta[count - 1 :: count], dtype)


@pytest.mark.parametrize(
    ("tokens", "batch", "heads"), [(1, 1, HEADS), (1, 3, WIDE_HEADS), (2, 3, HEADS), (5, 2, WIDE_HEADS)]
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_fused_equals_reference(
    tokens: int, batch: int, heads: DeltaHeads, dtype: torch.dtype, triton_device: str
) -> None:
    operands = problem(tokens, batch, dtype, triton_device, heads)
    dim, channels = heads.value_dim, sum(heads.sections[:3])
    conv = normal(7, batch, channels, CONV_KERNEL_SIZE - 1).to(triton_device, dtype)
    delta = normal(8, batch, heads.value_heads, dim, dim).to(triton_device)
    expected = decode_gated_delta_reference(*operands, heads, conv, delta)
    actual = decode_gated_delta(*operands, heads, conv, delta, fused=True)
    for a, b in zip(actual, expected):
        assert_near(a, b, dtype)


def test_states_are_split_only_while_sms_are_idle() -> None:
    """One sequence of the small model splits the writing of a state over four programs, a full batch over one."""
    pytest.importorskip("triton", reason="Triton ships with torch for Linux only")
    from megatron_q3n.kernels.decode.gated_delta_triton import block_sizes  # late: Triton

    num_splits = {num_states: block_sizes(128, num_states)["NUM_SPLITS"] for num_states in (8, 32, 48, 64, 256)}
    assert num_splits == {8: 4, 32: 4, 48: 2, 64: 2, 256: 1}
