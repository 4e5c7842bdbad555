"""Batches for supervised fine-tuning, as the training loop takes them: `PretrainData`'s counterpart.

Step s, micro-batch m, data parallel rank r of R holds row (s · micro-batches + m) · R + r of the run, so a
resumed run needs no position but its step, and every layout sees the same global batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_q3n.config import RunConfig
from megatron_q3n.data.batch import Batch
from megatron_q3n.data.sft_rows import SftRows, SpelledSet, lay_out
from megatron_q3n.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class SftData:
    """Training and validation rows, and the tokenizer they are written in."""

    config: RunConfig
    tokenizer: TextTokenizer
    train: SpelledSet
    validation: SpelledSet
    train_rows: SftRows
    validation_rows: SftRows

    @classmethod
    def of(cls, config: RunConfig, tokenizer: TextTokenizer, train: SpelledSet, validation: SpelledSet) -> "SftData":
        """Pack the sets into rows."""
        training, alignment = config.training, config.sft.alignment
        rows = [
            SftRows(part, training.sequence_length, alignment, training.seed, tokenizer.eod)
            for part in (train, validation)
        ]
        return cls(config, tokenizer, train, validation, rows[0], rows[1])

    def train_batches(self, first_step: int, dp_rank: int, dp_size: int) -> Iterator[list[Batch]]:
        """Yield, for each step from `first_step` to the last, this rank's micro-batches."""
        count = self.config.training.global_batch_size // dp_size
        for step in range(first_step, self.config.training.steps):
            first = step * count
            yield [self.train_rows.batch((first + micro) * dp_size + dp_rank) for micro in range(count)]

    def validation_batches(self, dp_rank: int, dp_size: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each validation batch, the same ones at every call, no row twice."""
        per_batch = self.config.training.global_batch_size
        rows = len(self.validation_rows)
        batches = min(self.config.validation.batches, -(-rows // per_batch))
        for batch in range(batches):
            numbers = range(batch * per_batch + dp_rank, (batch + 1) * per_batch, dp_size)
            yield [self._validation_row(number) for number in numbers]

    def train_sample_tokens(self, num_samples: int) -> Iterator[np.ndarray]:
        """Yield the tokens of the first rows that training sees."""
        return (_tokens(self.train_rows.batch(number)) for number in range(num_samples))

    def validation_sample_tokens(self) -> Iterator[np.ndarray]:
        """Yield the tokens of all rows that validation may see."""
        return (_tokens(self.validation_rows.batch(i)) for i in range(len(self.validation_rows)))

    def describe(self) -> dict[str, Any]:
        """Return plain facts for logs: conversations, what became of them, and passes over them."""
        training = self.config.training
        asked = training.steps * training.global_batch_size
        return {
            "tokenizer": {
                "fingerprint": self.tokenizer.fingerprint,
                "vocab_size": self.tokenizer.vocab_size,
                "eod": self.tokenizer.eod,
            },
            "sequence_length": training.sequence_length,
            "train": [_facts(self.train, self.train_rows, asked)],
            "validation": [_facts(self.validation, self.validation_rows, 0)],
        }

    def _validation_row(self, number: int) -> Batch:
        if number < len(self.validation_rows):
            return self.validation_rows.batch(number)
        training, alignment = self.config.training, self.config.sft.alignment
        return lay_out([], training.sequence_length, alignment, self.tokenizer.eod)


def _tokens(batch: Batch) -> np.ndarray:
    return np.append(batch.tokens_BT[0].numpy(), batch.labels_BT[0, -1].item())


def _facts(spelled: SpelledSet, rows: SftRows, asked: int) -> dict[str, Any]:
    fates = ", ".join(f"{count} {fate}" for fate, count in spelled.counts.items())
    return {
        "path": f"{len(spelled)} conversations in {len(rows)} rows ({fates})",
        "documents": len(spelled),
        "tokens": int(spelled.bounds[-1]),
        "epochs": asked / len(rows),
        **spelled.counts,
    }
