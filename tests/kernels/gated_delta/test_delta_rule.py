"""Chunked delta rule against the recurrent definition, in fp64: outputs, states, gradients, packing, carried state."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_q3n.kernels.gated_delta.delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from megatron_q3n.kernels.norms import l2_norm
from megatron_q3n.packing import Packing


def problem(
    batch: int, tokens: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (l2_norm(random(batch, tokens, key_heads, key_dim)) for _ in "qk")
    v = random(batch, tokens, value_heads, value_dim)
    g = -2 * random(batch, tokens, value_heads).sigmoid()
    beta = random(batch, tokens, value_heads).sigmoid()
    return [x.requires_grad_() for x in (q, k, v, g, beta)]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])
@pytest.mark.parametrize(("key_heads", "value_heads"), [(1, 1), (2, 6)])
@pytest.mark.parametrize("with_state", [False, True])
def test_chunked_equals_recurrent(tokens: int, key_heads: int, value_heads: int, with_state: bool) -> None:
    inputs = problem(2, tokens, key_heads, value_heads, 8, 5)
    state = torch.randn(2, value_heads, 8, 5, dtype=torch.float64).requires_grad_() if with_state else None
    leaves = inputs + ([state] if state is not None else [])
    results = []
    for rule in (chunk_gated_delta_rule, recurrent_gated_delta_rule):
        output, final = rule(*inputs, initial_state_DHKV=state)
        loss = output.sin().sum() + final.cos().sum()
        results.append((output, final, *torch.autograd.grad(loss, leaves)))
    for chunked, recurrent in zip(*results):
        torch.testing.assert_close(chunked, recurrent, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(sum),
    chunk=st.sampled_from([4, 16, 64]),
    with_state=st.booleans(),
    with_finals=st.booleans(),
)
def test_packed_documents_equal_single_ones(
    lengths: list[int], chunk: int, with_state: bool, with_finals: bool
) -> None:
    """Empty documents included: they return their state unchanged."""
    inputs = problem(1, sum(lengths), 2, 4, 4, 3)
    state = torch.randn(len(lengths), 4, 4, 3, dtype=torch.float64) if with_state else None
    packing = Packing.of([0, *itertools.accumulate(lengths)])
    output, finals = chunk_gated_delta_rule(
        *inputs, initial_state_DHKV=state, packing=packing, chunk_size=chunk, output_final_state=with_finals
    )
    assert (finals is not None) == with_finals
    packed_grads = torch.autograd.grad(output.sin().sum(), inputs)
    singles = []
    for d, (start, end) in enumerate(packing.spans):
        before = state[d : d + 1] if state is not None else None
        if start == end and not with_finals:
            continue
        if start == end:
            expected = before if before is not None else torch.zeros(1, 4, 4, 3, dtype=torch.float64)
            torch.testing.assert_close(finals[d : d + 1], expected, rtol=0, atol=0)
            continue
        alone, final = recurrent_gated_delta_rule(*(x[:, start:end] for x in inputs), initial_state_DHKV=before)
        if with_finals:
            torch.testing.assert_close(finals[d : d + 1], final, rtol=0, atol=1e-12)
        singles.append(alone)
    together = torch.cat(singles, dim=1)
    torch.testing.assert_close(output, together, rtol=0, atol=1e-12)
    for packed, single in zip(packed_grads, torch.autograd.grad(together.sin().sum(), inputs)):
        torch.testing.assert_close(packed, single, rtol=0, atol=1e-11)


def test_carried_state() -> None:
    inputs = problem(1, 90, 2, 4, 4, 3)
    whole, final = chunk_gated_delta_rule(*inputs)
    first, state = chunk_gated_delta_rule(*(x[:, :37] for x in inputs))
    second, end = recurrent_gated_delta_rule(*(x[:, 37:] for x in inputs), initial_state_DHKV=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(end, final, rtol=0, atol=1e-12)


def test_rejects_documents_that_do_not_cover_the_row() -> None:
    with pytest.raises(ValueError, match="must cover a batch of one row"):
        chunk_gated_delta_rule(*problem(1, 8, 1, 1, 2, 2), packing=Packing.of([0, 5]))
