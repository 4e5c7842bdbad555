"""Supervised fine-tuning batches: packed sequences of conversations, with the interface of `PretrainData`.

Step s, micro-batch m, data parallel rank r of R holds sequence (s · micro-batches + m) · R + r of the run, so a resumed
run needs its step only, and the global batch is the same in every parallel layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_q3n.config import RunConfig
from megatron_q3n.data.batch import Batch
from megatron_q3n.data.sft_packing import PackedConversations, pack
from megatron_q3n.data.tokenized_conversations import TokenizedConversations
from megatron_q3n.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class SftData:
    """Training and validation sequences, and their tokenizer."""

    config: RunConfig
    tokenizer: TextTokenizer
    train: TokenizedConversations
    validation: TokenizedConversations
    train_dataset: PackedConversations
    validation_dataset: PackedConversations

    @classmethod
    def of(
        cls,
        config: RunConfig,
        tokenizer: TextTokenizer,
        train: TokenizedConversations,
        validation: TokenizedConversations,
    ) -> "SftData":
        """Pack both sets of conversations into sequences."""
        weights = [source.weight for source in config.sft.train]
        train_rows = _packed(config, train, tokenizer.eod, weights if set(weights) != {1} else None)
        return cls(config, tokenizer, train, validation, train_rows, _packed(config, validation, tokenizer.eod))

    def train_batches(self, first_step: int, dp_rank: int, dp_size: int) -> Iterator[list[Batch]]:
        """Yield, for each step from `first_step` to the last, this rank's micro-batches."""
        num_microbatches = self.config.training.global_batch_size // dp_size
        for step in range(first_step, self.config.training.steps):
            first = step * num_microbatches
            yield [self.train_dataset.batch((first + micro) * dp_size + dp_rank) for micro in range(num_microbatches)]

    def validation_batches(self, dp_rank: int, dp_size: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each validation batch, the same at every call, each sequence once."""
        return self._validation_batches(self.validation_dataset, self.config.validation.batches, dp_rank, dp_size)

    def validation_sources(self, dp_rank: int, dp_size: int) -> Iterator[tuple[str, Iterator[list[Batch]]]]:
        """Yield the name of each validation source and this rank's micro-batches of it; nothing for a single source.

        Each source has its share of the validation batches, at least one.
        """
        by_source = self.validation.indices_by_source()
        if len(by_source) < 2:
            return
        for name, indices in by_source.items():
            rows = _packed(self.config, self.validation.select(indices, {}), self.tokenizer.eod)
            most = max(1, round(self.config.validation.batches * len(indices) / len(self.validation)))
            yield name, self._validation_batches(rows, most, dp_rank, dp_size)

    def train_sample_tokens(self, num_samples: int) -> Iterator[np.ndarray]:
        """Yield the tokens of the first training sequences. Shapes: (sequence_length + 1,) int64 each."""
        return (_tokens(self.train_dataset.batch(index)) for index in range(num_samples))

    def validation_sample_tokens(self) -> Iterator[np.ndarray]:
        """Yield the tokens of all validation sequences. Shapes: (sequence_length + 1,) int64 each."""
        return (_tokens(self.validation_dataset.batch(index)) for index in range(len(self.validation_dataset)))

    def describe(self) -> dict[str, Any]:
        """Return a JSON-serializable description for logs: tokenizer, conversations by outcome, and epochs."""
        training = self.config.training
        num_train_sequences = training.steps * training.global_batch_size
        return {
            "tokenizer": {
                "fingerprint": self.tokenizer.fingerprint,
                "vocab_size": self.tokenizer.vocab_size,
                "eod": self.tokenizer.eod,
            },
            "sequence_length": training.sequence_length,
            "train": [_describe(self.train, self.train_dataset, num_train_sequences)],
            "validation": [_describe(self.validation, self.validation_dataset, 0)],
        }

    def _validation_batches(
        self, rows: PackedConversations, most: int, dp_rank: int, dp_size: int
    ) -> Iterator[list[Batch]]:
        per_batch = self.config.training.global_batch_size
        for batch in range(min(most, -(-len(rows) // per_batch))):
            indices = range(batch * per_batch + dp_rank, (batch + 1) * per_batch, dp_size)
            yield [self._validation_sequence(rows, index) for index in indices]

    def _validation_sequence(self, rows: PackedConversations, index: int) -> Batch:
        """Return a validation sequence, or a padding sequence without loss past the last one."""
        if index < len(rows):
            return rows.batch(index)
        training, alignment = self.config.training, self.config.sft.alignment
        return pack([], training.sequence_length, alignment, self.tokenizer.eod)


def _packed(
    config: RunConfig, conversations: TokenizedConversations, eod: int, source_weights: list[float] | None = None
) -> PackedConversations:
    training, alignment = config.training, config.sft.alignment
    return PackedConversations(conversations, training.sequence_length, alignment, training.seed, eod, source_weights)


def _tokens(batch: Batch) -> np.ndarray:
    return np.append(batch.tokens_BT[0].numpy(), batch.labels_BT[0, -1].item())


def _describe(
    conversations: TokenizedConversations, dataset: PackedConversations, num_sequences: int
) -> dict[str, Any]:
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in conversations.counts.items())
    by_source = conversations.indices_by_source()
    if len(by_source) > 1:
        outcomes += "; " + ", ".join(f"{len(indices)} from {name}" for name, indices in by_source.items())
    return {
        "path": f"{len(conversations)} conversations in {len(dataset)} packed sequences ({outcomes})",
        "documents": len(conversations),
        "tokens": int(conversations.bounds[-1]),
        "epochs": num_sequences / len(dataset),
        **conversations.counts,
    }
