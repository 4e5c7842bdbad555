"""Bigram baseline: an interpolated Witten-Bell bigram model, fitted on the training sequences of a run.

A language model that does not beat it has learned no context beyond the previous token. With c the counts
in the training sequences, T(v) the number of different tokens seen after v, V the vocabulary size:

    P(w)   = (c(w) + T / V) / (c + T)                        unigram; T different tokens seen, c in all
    P(w|v) = (c(v, w) + T(v) P(w)) / (c(v) + T(v))           bigram

A context with many different followers gives more probability to unseen ones. Counts are stored by sorted codes
v·V + w, so that memory grows with the pairs that occur and not with the square of the vocabulary.

Reference: Witten & Bell 1991, IEEE Trans. Information Theory 37(4), method C; interpolated form of
Chen & Goodman 1999, Computer Speech & Language 13(4), section 2.4.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

_SEQUENCES_PER_BLOCK = 4096


@dataclass(frozen=True)
class BigramResult:
    """Cross-entropy of the bigram model on the validation sequences."""

    bits_per_token: float
    bits_per_byte: float
    num_train_pairs: int
    num_validation_pairs: int
    num_validation_bytes: int


class WittenBellBigram:
    """Pair counts of the training sequences, and the probabilities derived from them."""

    def __init__(self, train_sequences: Iterable[np.ndarray], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._codes, self._counts = _count_pairs(train_sequences, vocab_size)
        self.num_pairs = int(self._counts.sum())
        assert self.num_pairs, "the training sequences hold no pair of tokens"
        first, second = np.divmod(self._codes, vocab_size)
        self._context_V = np.bincount(first, self._counts, minlength=vocab_size)
        self._followers_V = np.bincount(first, minlength=vocab_size)
        count_V = np.bincount(second, self._counts, minlength=vocab_size)
        num_types = np.count_nonzero(count_V)
        self.unigram_V = (count_V + num_types / vocab_size) / (self.num_pairs + num_types)

    def probability(self, first_N: np.ndarray, second_N: np.ndarray) -> np.ndarray:
        """Return P(second | first) of each pair. Shapes: ids (N,), result (N,) float64."""
        codes_N = first_N.astype(np.int64) * self.vocab_size + second_N
        index_N = np.searchsorted(self._codes, codes_N).clip(max=len(self._codes) - 1)
        count_N = np.where(self._codes[index_N] == codes_N, self._counts[index_N], 0)
        followers_N = self._followers_V[first_N]
        total_N = self._context_V[first_N] + followers_N
        unigram_N = self.unigram_V[second_N]
        mixed_N = (count_N + followers_N * unigram_N) / np.maximum(total_N, 1)
        # an unseen context falls back to the unigram
        return np.where(total_N > 0, mixed_N, unigram_N)


def witten_bell_bits_per_byte(
    train_sequences: Iterable[np.ndarray],
    validation_sequences: Iterable[np.ndarray],
    vocab_size: int,
    token_num_bytes: np.ndarray,
) -> BigramResult:
    """Fit on the pairs (x[t], x[t+1]) of the training sequences and measure on those of the validation sequences.

    Shapes: sequences of sequence_length + 1 ids; token_num_bytes (vocab_size,), the UTF-8 bytes of each token.
    Units: bits of the tokens 1…T of each sequence, divided by the bytes of the same tokens.
    """
    model = WittenBellBigram(train_sequences, vocab_size)
    bits = 0.0
    num_pairs = num_bytes = 0
    for first_N, second_N in _pairs_of(validation_sequences):
        bits -= float(np.log2(model.probability(first_N, second_N)).sum())
        num_pairs += len(second_N)
        num_bytes += int(token_num_bytes[second_N].sum())
    assert num_bytes, "the validation sequences decode to no text"
    return BigramResult(
        bits_per_token=bits / num_pairs,
        bits_per_byte=bits / num_bytes,
        num_train_pairs=model.num_pairs,
        num_validation_pairs=num_pairs,
        num_validation_bytes=num_bytes,
    )


def _pairs_of(sequences: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield first and second tokens of all adjacent pairs within sequences, a block of sequences at a time."""
    for block in itertools.batched(sequences, _SEQUENCES_PER_BLOCK):
        first_N = np.concatenate([sequence[:-1] for sequence in block]).astype(np.int64)
        second_N = np.concatenate([sequence[1:] for sequence in block]).astype(np.int64)
        yield first_N, second_N


def _count_pairs(sequences: Iterable[np.ndarray], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted codes of the pairs that occur, and the count of each."""
    codes = counts = np.empty(0, dtype=np.int64)
    for first_N, second_N in _pairs_of(sequences):
        new_codes, new_counts = np.unique(first_N * vocab_size + second_N, return_counts=True)
        codes, inverse = np.unique(np.concatenate([codes, new_codes]), return_inverse=True)
        total = np.bincount(inverse, np.concatenate([counts, new_counts]))
        counts = total.astype(np.int64)
    return codes, counts
