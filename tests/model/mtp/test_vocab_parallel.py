"""Vocabulary-parallel operations on logits, on one rank against torch.

With a sharded vocabulary: tests/tools/layouts/test_more_layouts.py.
"""

from typing import Any

import torch


def test_divergence_and_its_gradient_are_torchs(alone: Any) -> None:
    from megatron_q3n.model.mtp.vocab_parallel import Divergence

    group = alone[1].groups.tp
    generator = torch.Generator().manual_seed(0)
    logits, target = (torch.randn(5, 2, 11, generator=generator).double() for _ in range(2))
    ours = logits.clone().requires_grad_()
    losses_SB = Divergence.apply(ours, target, group)
    theirs = logits.clone().requires_grad_()
    p, log_q = target.softmax(-1), theirs.log_softmax(-1)
    expected_SB = (p * (p.log() - log_q)).sum(-1)
    weights = torch.randn(5, 2, generator=generator).double()
    (losses_SB * weights).sum().backward()
    (expected_SB * weights).sum().backward()
    torch.testing.assert_close(losses_SB.double(), expected_SB, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5)


def test_hashed_numbers_are_uniform_and_new_at_every_step(alone: Any) -> None:
    from megatron_q3n.model.mtp.vocab_parallel import hashed_uniform

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 512, (64, 256), generator=generator)
    positions = torch.arange(256).expand_as(tokens)
    first, second = (hashed_uniform(tokens, positions, torch.tensor([step])) for step in (3, 4))
    for numbers in (first, second):
        assert 0 <= numbers.min() < numbers.max() < 1
        for probability in (0.1, 0.5, 0.9):
            assert abs((numbers < probability).float().mean().item() - probability) < 0.02
    both = ((first < 0.5) & (second < 0.5)).float().mean().item()
    assert abs(both - 0.25) < 0.02
