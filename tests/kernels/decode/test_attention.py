"""Attention of a few new tokens, fused, against its torch reference in fp64: output, and what is left in the cache.

Without a GPU the kernels run in Triton's interpreter. What the compiler makes of them: tests/kernels/startup/test_hopper_compiler.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_q3n.kernels.decode import attention as module
from megatron_q3n.kernels.decode.attention import AttentionHeads, HeadNorms, few_queries

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}

pytestmark = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])


def case(heads: AttentionHeads, tokens: int, starts: list[int], room: int, device: str, dtype: Any) -> list[Any]:
    """Return random arguments, the cache of NaN where nothing was written."""
    generator = torch.Generator().manual_seed(tokens + sum(starts))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    rows, capacity, dim = len(starts), room + tokens + 3, heads.dim
    width = heads.groups * (heads.queries * (1 + heads.is_gated) + 2) * dim
    qkv = normal(tokens, rows, width + 8)[..., :width]  # rows apart
    turned = max(2, dim // 4)
    angles = torch.randn(capacity, turned // 2, generator=generator).repeat(1, 2)
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(turned // 2)
    rotary = torch.cat([angles.cos(), angles.sin() * sign], 1).to(device, dtype)
    norms = HeadNorms(0.2 * normal(dim), 0.2 * normal(dim), 1e-6)
    cache = [normal(rows, heads.groups, capacity, dim) for _ in range(2)]
    for row, start in enumerate(starts):
        for stored in cache:
            stored[row, :, start:] = float("nan")
    # as decoding cuts them out of positions: one alone keeps the stride of its tokens
    start_N = torch.tensor(starts, device=device)[:, None].repeat(1, tokens)[:, 0].contiguous()
    return [qkv, heads, norms, rotary, start_N, room, *cache]


def doubled(given: list[Any]) -> list[Any]:
    """Return the same in fp64, the cache finite: the reference multiplies what is hidden by zero."""
    norms = given[2]
    if norms is not None:
        norms = HeadNorms(norms.query_D.double(), norms.key_D.double(), norms.eps, norms.offset)
    cache = [stored.double().nan_to_num() for stored in given[6:]]
    return [given[0].double(), given[1], norms, given[3].double(), *given[4:6], *cache]


def check(given: list[Any], dtype: torch.dtype) -> None:
    exact = doubled(given)
    wanted = few_queries(*exact, fused=False)
    got = few_queries(*given, fused=True)
    assert got.shape == wanted.shape
    # by row: a short one beside a long one must be as right
    error = (got.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert error.max() < TOLERANCE[dtype], error
    for ours, theirs in zip(given[6:], exact[6:]):
        written = torch.zeros_like(ours, dtype=torch.bool)
        for row, start in enumerate(given[4].tolist()):
            written[row, :, : start + len(got)] = True
        near = TOLERANCE[dtype] * (1 + theirs.abs())
        assert ((ours.double() - theirs).abs() <= near)[written].all()
        assert ours[~written].isnan().all(), "nothing is written behind the new tokens"


@pytest.mark.parametrize(
    ("dim", "groups", "tokens", "queries", "starts", "room"),
    [
        (64, 2, 1, 4, [0], 0),
        (128, 2, 1, 8, [700], 900),
        (64, 2, 2, 3, [0, 1, 65, 400], 410),  # unequal lengths, one of them nothing
        (256, 1, 5, 8, [130, 64], 200),  # more rows than a program has
        (128, 1, 16, 8, [65], 65),
        (256, 2, 16, 1, [33, 0], 64),
        (32, 1, 3, 5, [64, 63], 64),
    ],
)
def test_few_queries(
    dim: int,
    groups: int,
    tokens: int,
    queries: int,
    starts: list[int],
    room: int,
    dtype: torch.dtype,
    triton_device: str,
) -> None:
    heads = AttentionHeads(groups, queries, dim, True, dim**-0.5)
    check(case(heads, tokens, starts, room, triton_device, dtype), dtype)


@pytest.mark.parametrize("window", [1, 40, 100, 1000])
@pytest.mark.parametrize("tokens", [1, 7])
def test_windows(window: int, tokens: int, dtype: torch.dtype, triton_device: str) -> None:
    heads = AttentionHeads(1, 2, 32, True, 0.2, window)
    check(case(heads, tokens, [0, 5, 200, 64], 210, triton_device, dtype), dtype)


def test_without_gate_and_norms(dtype: torch.dtype, triton_device: str) -> None:
    heads = AttentionHeads(3, 5, 16, False, 0.3)
    given = case(heads, 3, [50, 200], 200, triton_device, dtype)
    given[2] = None
    check(given, dtype)


def test_more_pieces_than_are_added_up_at_once(dtype: torch.dtype, triton_device: str) -> None:
    """A room for many splits, and lengths that leave most without keys, or each with several blocks."""
    from megatron_q3n.kernels.decode.attention_triton import num_splits

    assert num_splits(10_000, 1, 64, None) > 64
    heads = AttentionHeads(1, 2, 16, True, 0.25)
    for starts in ([9000], [63], [4500]):
        check(case(heads, 2, starts, 10_000, triton_device, dtype), dtype)


def test_a_room_does_not_change_what_is_said_within_it(dtype: torch.dtype, triton_device: str) -> None:
    heads = AttentionHeads(2, 4, 64, True, 0.125)
    given = case(heads, 2, [100, 3], 5000, triton_device, dtype)
    roomy = few_queries(*given, fused=True)
    tight = few_queries(*given[:5], 100, *given[6:], fused=True)
    torch.testing.assert_close(roomy, tight, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_sizes_that_no_kernel_has_take_the_reference(dtype: torch.dtype, triton_device: str) -> None:
    heads = AttentionHeads(1, 2, 24, True, 0.2)
    assert not module.fits(heads, 1)
    assert not module.fits(AttentionHeads(1, 2, 32, True, 0.2), 17)
    given = case(heads, 1, [4], 8, triton_device, dtype)
    for stored in given[6:]:
        stored.nan_to_num_()
    assert few_queries(*given, fused=True).isfinite().all()
