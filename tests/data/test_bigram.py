"""Bigram baseline against the formulas evaluated pair by pair."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_q3n.data.bigram import WittenBellBigram, witten_bell_bits_per_byte

VOCAB_SIZE = 7
ROWS = st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=2, max_size=12).map(np.array), min_size=1, max_size=8)


def slow_probability(rows: list[np.ndarray], first: int, second: int) -> float:
    """Witten-Bell as in the textbook, with dictionaries."""
    pairs = Counter((int(v), int(w)) for row in rows for v, w in itertools.pairwise(row))
    tokens: Counter[int] = Counter()
    for (_, w), count in pairs.items():
        tokens[w] += count
    total, different = sum(tokens.values()), len(tokens)
    unigram = (tokens[second] + different * (1 / VOCAB_SIZE)) / (total + different)
    context = sum(count for (v, _), count in pairs.items() if v == first)
    followers = len({w for (v, w) in pairs if v == first})
    if not context:
        return unigram
    return (pairs[first, second] + followers * unigram) / (context + followers)


@given(ROWS)
def test_probabilities_are_the_textbook_ones_and_sum_to_one(rows: list[np.ndarray]) -> None:
    model = WittenBellBigram(rows, VOCAB_SIZE)
    everything = np.arange(VOCAB_SIZE)
    for first in range(VOCAB_SIZE):
        fast = model.probability(np.full(VOCAB_SIZE, first), everything)
        slow = [slow_probability(rows, first, second) for second in range(VOCAB_SIZE)]
        np.testing.assert_allclose(fast, slow, rtol=1e-12)
        assert fast.sum() == pytest.approx(1.0, abs=1e-12)
    assert model.unigram_V.sum() == pytest.approx(1.0, abs=1e-12)


@given(ROWS, ROWS)
def test_bits_per_byte(train: list[np.ndarray], validation: list[np.ndarray]) -> None:
    num_bytes_V = np.array([1, 1, 2, 3, 1, 4, 2])
    result = witten_bell_bits_per_byte(iter(train), iter(validation), VOCAB_SIZE, num_bytes_V)
    pairs = [(v, w) for row in validation for v, w in itertools.pairwise(row)]
    bits = -sum(math.log2(slow_probability(train, v, w)) for v, w in pairs)
    assert result.num_validation_pairs == len(pairs)
    assert result.num_train_pairs == sum(len(row) - 1 for row in train)
    assert result.bits_per_token == pytest.approx(bits / len(pairs), rel=1e-12)
    assert result.bits_per_byte == pytest.approx(bits / sum(num_bytes_V[w] for _, w in pairs), rel=1e-12)


def test_many_blocks_of_a_large_vocabulary_are_counted_as_one() -> None:
    generator = np.random.default_rng(0)
    # more sequences than one block holds
    rows = list(generator.integers(0, 150_000, size=(9000, 4)))
    model = WittenBellBigram(rows, 150_000)
    assert model.num_pairs == 27_000
    first, second = (np.concatenate([rows[0][:-1], rows[-1][:-1]]), np.concatenate([rows[0][1:], rows[-1][1:]]))
    followers = Counter((int(v), int(w)) for row in rows for v, w in itertools.pairwise(row))
    contexts = Counter(int(v) for row in rows for v in row[:-1])
    for v, w, got in zip(first, second, model.probability(first, second)):
        different = sum(1 for pair in followers if pair[0] == v)
        expected = (followers[v, w] + different * model.unigram_V[w]) / (contexts[v] + different)
        assert got == pytest.approx(expected, rel=1e-12)


def test_repeating_text_costs_less_than_noise() -> None:
    pattern = [np.tile([0, 1, 2], 50)] * 4
    noise = list(np.random.default_rng(1).integers(0, 3, size=(4, 150)))
    ones_V = np.ones(VOCAB_SIZE, dtype=np.int64)
    learned = witten_bell_bits_per_byte(pattern, pattern, VOCAB_SIZE, ones_V)
    hopeless = witten_bell_bits_per_byte(noise, noise, VOCAB_SIZE, ones_V)
    assert learned.bits_per_token < 0.1
    assert math.log2(3) * 0.95 < hopeless.bits_per_token < math.log2(3) * 1.1
