"""A few tokens from a state: against the whole rule over the same tokens, and the fused form against the composed.

Without a GPU the fused kernel runs in Triton's interpreter.
"""

import pytest
import torch
from torch import Tensor

from megatron_q3n.kernels.decode.gated_delta import composed_delta_steps, delta_steps
from megatron_q3n.kernels.gated_delta.delta_rule import chunk_gated_delta_rule
from megatron_q3n.kernels.gated_delta.mixer import DeltaHeads, DeltaWeights, composed_delta_mixer

HEADS = DeltaHeads(key_heads=2, value_heads=4, key_dim=16, value_dim=16, eps=1e-6)
CHANNELS, TAPS = sum(HEADS.sections[:3]), 4
# as the kernel lays it out, two warps have a part of the columns each
WIDER = DeltaHeads(key_heads=1, value_heads=4, key_dim=64, value_dim=64, eps=1e-6)
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(tokens: int, batch: int, dtype: torch.dtype, device: str = "cpu", heads: DeltaHeads = HEADS) -> tuple:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = (2, heads.value_heads), (3, heads.value_heads), (4, heads.value_dim)
    weights = DeltaWeights(
        normal(1, sum(heads.sections[:3]), TAPS).to(device, dtype),
        *(normal(i, size).to(device, wide) for i, size in sizes),
    )
    qkvz = normal(5, tokens, batch, sum(heads.sections))
    ba = normal(6, tokens, batch, 2 * heads.value_heads)
    return qkvz.to(device, dtype), ba.to(device, dtype), weights


def assert_near(ours: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == wanted.shape
    error = (ours.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("cut", [[9], [1] * 9, [4, 1, 4], [2, 3, 4]])
def test_pieces_give_what_the_whole_rule_gives(cut: list[int]) -> None:
    dtype = torch.float64
    qkvz, ba, weights = problem(9, 3, dtype)
    wanted = composed_delta_mixer(qkvz, ba, weights, HEADS, chunk_gated_delta_rule)
    conv = torch.zeros(3, CHANNELS, TAPS - 1, dtype=dtype)
    delta = torch.zeros(3, 4, 16, 16, dtype=dtype)
    outputs, start = [], 0
    for count in cut:
        piece = slice(start, start + count)
        out, convs, deltas = composed_delta_steps(qkvz[piece], ba[piece], weights, HEADS, conv, delta)
        conv, delta = convs[count - 1 :: count], deltas[count - 1 :: count]
        outputs.append(out)
        start += count
    assert_near(torch.cat(outputs), wanted, dtype)


def test_states_after_each_token_are_those_of_shorter_calls() -> None:
    dtype = torch.float64
    qkvz, ba, weights = problem(5, 2, dtype)
    conv, delta = normal(7, 2, CHANNELS, TAPS - 1).to(dtype), normal(8, 2, 4, 16, 16).to(dtype)
    _, convs, deltas = composed_delta_steps(qkvz, ba, weights, HEADS, conv, delta)
    for count in range(1, 6):
        _, short_conv, short_delta = composed_delta_steps(qkvz[:count], ba[:count], weights, HEADS, conv, delta)
        assert_near(convs[count - 1 :: 5], short_conv[count - 1 :: count], dtype)
        assert_near(deltas[count - 1 :: 5], short_delta[count - 1 :: count], dtype)


@pytest.mark.parametrize(("tokens", "batch", "heads"), [(1, 1, HEADS), (1, 3, WIDER), (2, 3, HEADS), (5, 2, WIDER)])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_fused_form_equals_the_composed_one(
    tokens: int, batch: int, heads: DeltaHeads, dtype: torch.dtype, triton_device: str
) -> None:
    given = problem(tokens, batch, dtype, triton_device, heads)
    dim, channels = heads.value_dim, sum(heads.sections[:3])
    conv = normal(7, batch, channels, TAPS - 1).to(triton_device, dtype)
    delta = normal(8, batch, heads.value_heads, dim, dim).to(triton_device)
    wanted = composed_delta_steps(*given, heads, conv, delta)
    ours = delta_steps(*given, heads, conv, delta, fused=True)
    for a, b in zip(ours, wanted):
        assert_near(a, b, dtype)


def test_states_are_shared_out_only_while_there_are_too_few() -> None:
    """To programs that write a part each; one head of the small model alone to four, a full batch's to one."""
    pytest.importorskip("triton", reason="Triton ships with torch for Linux only")
    from megatron_q3n.kernels.decode.gated_delta_triton import block_sizes  # late: Triton

    shares = {matrices: block_sizes(128, matrices)["SHARES"] for matrices in (8, 32, 48, 64, 256)}
    assert shares == {8: 4, 32: 4, 48: 2, 64: 2, 256: 1}
