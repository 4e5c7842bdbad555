"""Sampling distribution, samples that follow it, and verification of drafts that preserves it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_q3n.config import UserError, validate
from megatron_q3n.inference import mixed_sampling
from megatron_q3n.inference.mixed_sampling import MixedSampling
from megatron_q3n.inference.sampling import Sampling, distribution, greedy_tokens, rejection_sample, sample_tokens
from megatron_q3n.kernels.decode.argmax import verify_greedy
from tests.inference.chi_square import z_score

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
NUM_SAMPLES = 20_000


def uniforms(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probabilities(**settings: Any) -> list[float]:
    return distribution(LOGITS[None], Sampling(1, **settings))[0].tolist()


def test_temperature_divides_the_logits() -> None:
    assert probabilities(temperature=0.5) == pytest.approx((2 * LOGITS).softmax(0).tolist())


def test_top_k_keeps_the_most_probable() -> None:
    top_two = LOGITS[:2].softmax(0).tolist()
    assert probabilities(top_k=2) == pytest.approx([*top_two, 0, 0, 0])
    assert probabilities(top_k=9) == pytest.approx(LOGITS.softmax(0).tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    mass = LOGITS.softmax(0).cumsum(0).tolist()
    assert [p > 0 for p in probabilities(top_p=mass[0] - 1e-3)] == [True] + [False] * 4
    assert [p > 0 for p in probabilities(top_p=mass[0] + 1e-3)] == [True] * 2 + [False] * 3
    assert sum(probabilities(top_p=0.7)) == pytest.approx(1)


def test_padding_rows_of_the_vocabulary_are_never_sampled() -> None:
    assert probabilities(vocab_size=2) == pytest.approx([*LOGITS[:2].softmax(0).tolist(), 0, 0, 0])
    assert greedy_tokens(-LOGITS[None], 3).tolist() == [2]
    assert greedy_tokens(-LOGITS[None], None).tolist() == [4]


def test_samples_follow_the_distribution() -> None:
    weights = torch.tensor([0.1, 0.0, 0.5, 0.15, 0.25])
    tokens = sample_tokens(weights.expand(NUM_SAMPLES, -1) * 3, uniforms(NUM_SAMPLES))
    counts = torch.bincount(tokens, minlength=5).tolist()
    assert counts[1] == 0
    assert z_score(counts, weights.tolist()) < 3.5
    assert z_score(counts, [0.1, 1e-9, 0.5, 0.2, 0.2]) > 10, "the test detects wrong samples"


def test_samples_at_the_edges() -> None:
    weights = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    assert sample_tokens(weights, torch.zeros(1, dtype=torch.float64)).tolist() == [1]
    assert sample_tokens(weights, torch.tensor([1 - 2.0**-53], dtype=torch.float64)).tolist() == [2]


@pytest.mark.parametrize("depth", [1, 3])
def test_verified_drafts_follow_the_target_distribution(depth: int) -> None:
    """Tokens and their number follow the target distribution; p and q differ by position."""
    generator = torch.Generator().manual_seed(depth)
    target = torch.randn(depth + 1, 5, generator=generator).softmax(-1)
    draft = torch.randn(depth, 5, generator=generator).softmax(-1)
    q = draft.expand(NUM_SAMPLES, -1, -1)
    drafts = torch.stack([sample_tokens(q[:, d], uniforms(NUM_SAMPLES, seed=10 + d)) for d in range(depth)], 1)
    num_accepted, sampled = rejection_sample(
        target.expand(NUM_SAMPLES, -1, -1), q, drafts, uniforms(NUM_SAMPLES, depth + 1, seed=99)
    )
    chosen = torch.nn.functional.pad(drafts, (0, 1)).scatter(1, num_accepted[:, None], sampled[:, None])
    for position in range(depth + 1):
        tokens = chosen[num_accepted >= position, position]
        counts = torch.bincount(tokens, minlength=5).tolist()
        assert z_score(counts, target[position].tolist()) < 3.5
    acceptance_rates = [torch.minimum(target[d], draft[d]).sum().item() for d in range(depth)]
    reached = NUM_SAMPLES
    for d, rate in enumerate(acceptance_rates):
        count = int((num_accepted > d).sum())
        assert z_score([count, reached - count], [rate, 1 - rate]) < 3.5
        reached = count


def test_drafts_without_verification_would_be_detected() -> None:
    target, draft = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).softmax(-1)
    counts = torch.bincount(sample_tokens(draft.expand(NUM_SAMPLES, -1), uniforms(NUM_SAMPLES)), minlength=5)
    assert z_score(counts.tolist(), target.tolist()) > 10


@pytest.mark.parametrize(("drafts", "accepted", "sampled"), [([1, 2, 0], 2, 3), ([1, 2, 3], 3, 4), ([0, 2, 3], 0, 1)])
def test_greedy_verification_accepts_exactly_the_argmax_tokens(drafts: list[int], accepted: int, sampled: int) -> None:
    """The general rule does the same with all probability on one token."""
    best, proposed = torch.tensor([[1, 2, 3, 4]]), torch.tensor([drafts])
    one_hot = torch.nn.functional.one_hot
    verified = verify_greedy(one_hot(best, 5).float(), proposed)
    assert verified.packed[0, 0] == accepted
    assert verified.chosen_NT.flatten()[verified.row_N].tolist() == [sampled]
    zeros = torch.zeros(1, 4, dtype=torch.float64)
    general = rejection_sample(one_hot(best, 5).float(), one_hot(proposed, 5).float(), proposed, zeros)
    assert [x.tolist() for x in general] == [[accepted], [sampled]]


WRONG_PARAMETERS: list[dict[str, Any]] = [
    *({"temperature": value} for value in (-1.0, 1e-40, 9e-4, 1e9, float("nan"), float("inf"))),
    *({"top_p": value} for value in (0.0, -0.5, 1.01, float("nan"))),
    *({"top_k": value} for value in (0, -1)),
]


@pytest.mark.parametrize("parameters", WRONG_PARAMETERS)
def test_parameters_that_describe_no_distribution_are_refused_everywhere(parameters: dict[str, Any]) -> None:
    (name,) = parameters
    with pytest.raises(UserError, match=f"{name}=.*must be"):
        Sampling(1, **parameters)
    with pytest.raises(UserError, match=rf"inference\.{name}="):
        validate({"stage": "generate", "checkpoint": {"load": "x"}, "inference": parameters})
    if name == "temperature":
        with pytest.raises(UserError, match=r"rl\.rollout\.temperature="):
            validate({"stage": "rl", "rl": {"rollout": parameters}})
        with pytest.raises(UserError, match=r"samples\.temperature="):
            validate({"samples": parameters})


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_the_limits_of_the_temperature_give_a_distribution(temperature: float) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert distribution(logits, Sampling(1, temperature)).sum() == pytest.approx(1)


MIXED = [
    Sampling(1, 0.0),
    Sampling(1, 1.0),
    Sampling(1, 0.5, top_k=2),
    Sampling(1, 2.0, top_p=0.6),
    Sampling(1, 1.0, top_k=3, top_p=0.7),
    Sampling(1, 1e-3),
]


@pytest.mark.parametrize("vocab_size", [5, 4])
def test_mixed_sampling_equals_the_same_parameters_alone(vocab_size: int) -> None:
    logits = torch.randn(len(MIXED), 2, 5, generator=torch.Generator().manual_seed(2))
    mixed = MixedSampling(vocab_size).for_sequences(MIXED)
    found = mixed.distribution(logits, mixed_sampling.parameters(MIXED, vocab_size))
    for row, sampling in enumerate(MIXED):
        own = replace(sampling, vocab_size=vocab_size)
        if own.is_greedy:
            wanted = torch.nn.functional.one_hot(greedy_tokens(logits[row], vocab_size), 5).float()
        else:
            wanted = distribution(logits[row], own)
        torch.testing.assert_close(found[row], wanted)
    unrestricted = MixedSampling(vocab_size).for_sequences(MIXED[:2])
    assert not unrestricted.restricts_tokens
    torch.testing.assert_close(
        unrestricted.distribution(logits[:2], mixed_sampling.parameters(MIXED[:2], vocab_size)), found[:2]
    )
