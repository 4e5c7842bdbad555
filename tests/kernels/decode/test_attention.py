"""Decode attention, fused, against its torch reference in fp64: output and KV cache.

Without a GPU the kernels run in Triton's interpreter. Compiled code: tests/kernels/startup/test_hopper_compiler.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_q3n.kernels.decode.attention import decode_attention
from megatron_q3n.kernels.decode.operands import AttentionHeads, QKNormWeights

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}

pytestmark = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])


def case(heads: AttentionHeads, tokens: int, starts: list[int], max_start: int, device: str, dtype: Any) -> list[Any]:
    """Return random arguments; the cache is NaN where it was not written."""
    generator = torch.Generator().manual_seed(tokens + sum(starts))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    rows, capacity, dim = len(starts), max_start + tokens + 3, heads.head_dim
    width = heads.num_groups * (heads.queries_per_group * (1 + heads.is_gated) + 2) * dim
    qkv = normal(tokens, rows, width + 8)[..., :width]
    rotary_dim = max(2, dim // 4)
    angles = torch.randn(capacity, rotary_dim // 2, generator=generator).repeat(1, 2)
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(rotary_dim // 2)
    rotary = torch.cat([angles.cos(), angles.sin() * sign], 1).to(device, dtype)
    norms = QKNormWeights(0.2 * normal(dim), 0.2 * normal(dim), 1e-6)
    cache = [normal(rows, heads.num_groups, capacity, dim) for _ in range(2)]
    for row, start in enumerate(starts):
        for cache_tensor in cache:
            cache_tensor[row, :, start:] = float("nan")
    # as in decoding, a column of the positions: for one sequence it keeps the stride of its tokens
    start_N = torch.tensor(starts, device=device)[:, None].repeat(1, tokens)[:, 0].contiguous()
    return [qkv, heads, norms, rotary, start_N, max_start, *cache]


def in_fp64(operands: list[Any]) -> list[Any]:
    """Return the same in fp64 with a finite cache: the reference multiplies masked values by zero."""
    norms = operands[2]
    if norms is not None:
        norms = QKNormWeights(norms.query_D.double(), norms.key_D.double(), norms.eps, norms.offset)
    cache = [cache_tensor.double().nan_to_num() for cache_tensor in operands[6:]]
    return [operands[0].double(), operands[1], norms, operands[3].double(), *operands[4:6], *cache]


def check(operands: list[Any], dtype: torch.dtype) -> None:
    exact = in_fp64(operands)
    expected = decode_attention(*exact, fused=False)
    actual = decode_attention(*operands, fused=True)
    assert actual.shape == expected.shape
    # per row, so that a long sequence does not hide the error of a short one
    error = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < TOLERANCE[dtype], error
    for actual_cache, expected_cache in zip(operands[6:], exact[6:]):
        written = torch.zeros_like(actual_cache, dtype=torch.bool)
        for row, start in enumerate(operands[4].tolist()):
            written[row, :, : start + len(actual)] = True
        tolerance = TOLERANCE[dtype] * (1 + expected_cache.abs())
        assert ((actual_cache.double() - expected_cache).abs() <= tolerance)[written].all()
        assert actual_cache[~written].isnan().all(), "only the new tokens are written"


@pytest.mark.parametrize(
    ("dim", "groups", "tokens", "queries", "starts", "max_start"),
    [
        (64, 2, 1, 4, [0], 0),
        (128, 2, 1, 8, [700], 900),
        (64, 2, 2, 3, [0, 1, 65, 400], 410),
        (256, 1, 5, 8, [130, 64], 200),
        (128, 1, 16, 8, [65], 65),
        (256, 2, 16, 1, [33, 0], 64),
        (32, 1, 3, 5, [64, 63], 64),
    ],
)
def test_decode_attention(
    dim: int,
    groups: int,
    tokens: int,
    queries: int,
    starts: list[int],
    max_start: int,
    dtype: torch.dtype,
    triton_device: str,
) -> None:
    heads = AttentionHeads(groups, queries, dim, True, dim**-0.5)
    check(case(heads, tokens, starts, max_start, triton_device, dtype), dtype)


@pytest.mark.parametrize("window", [1, 40, 100, 1000])
@pytest.mark.parametrize("tokens", [1, 7])
def test_windows(window: int, tokens: int, dtype: torch.dtype, triton_device: str) -> None:
    heads = AttentionHeads(1, 2, 32, True, 0.2, window)
    check(case(heads, tokens, [0, 5, 200, 64], 210, triton_device, dtype), dtype)


def test_without_gate_and_norms(dtype: torch.dtype, triton_device: str) -> None:
    heads = AttentionHeads(3, 5, 16, False, 0.3)
    operands = case(heads, 3, [50, 200], 200, triton_device, dtype)
    operands[2] = None
    check(operands, dtype)


def test_more_splits_than_are_combined_per_step(dtype: torch.dtype, triton_device: str) -> None:
    """A maximum length for many splits, and lengths that leave most without keys, or each with several blocks."""
    from megatron_q3n.kernels.decode.attention_triton import choose_num_splits

    assert choose_num_splits(10_000, 1, 64, None) > 64
    heads = AttentionHeads(1, 2, 16, True, 0.25)
    for starts in ([9000], [63], [4500]):
        check(case(heads, 2, starts, 10_000, triton_device, dtype), dtype)


def test_result_does_not_depend_on_max_start(dtype: torch.dtype, triton_device: str) -> None:
    heads = AttentionHeads(2, 4, 64, True, 0.125)
    operands = case(heads, 2, [100, 3], 5000, triton_device, dtype)
    long_result = decode_attention(*operands, fused=True)
    short_result = decode_attention(*operands[:5], 100, *operands[6:], fused=True)
    torch.testing.assert_close(long_result, short_result, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
