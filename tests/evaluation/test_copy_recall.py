"""Copy recall probe: its sequences, its sums, and a model's results against a direct computation from full logits.

Two ranks: tests/stages/test_evaluate.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_q3n.config import UserError, validate
from megatron_q3n.evaluation.copy_recall import measure_recall, repeated_sequences, score_tokens, sum_by_copy
from tests.inference.tiny_model import full_logits, tiny_model

VOCAB, EOD, LENGTH = 64, 0, 9


def sequences(numbers: range, seed: int = 1, length: int = LENGTH) -> torch.Tensor:
    text = np.array([EOD, *range(10, 40), EOD] * 4)
    return repeated_sequences(text, EOD, length, numbers, seed)


def test_a_sequence_is_the_separator_and_the_same_tokens_of_the_text_twice() -> None:
    rows = sequences(range(50))
    assert rows.shape == (50, 2 * LENGTH + 1)
    assert rows[:, 0].eq(EOD).all()
    assert torch.equal(rows[:, 1 : LENGTH + 1], rows[:, LENGTH + 1 :])
    assert set(rows[:, 1:].flatten().tolist()) <= set(range(10, 40))


def test_a_sequence_depends_only_on_its_index_length_and_seed() -> None:
    """Replicas that split the sequences therefore measure the same as one process."""
    rows = sequences(range(6))
    assert torch.equal(rows[4:], sequences(range(4, 6)))
    assert len({tuple(row.tolist()) for row in rows}) == 6
    assert not torch.equal(rows, sequences(range(6), seed=2))


def scores(logits_NTV: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores_NT2 = score_tokens(logits_NTV.flatten(0, 1), rows[:, 1:].flatten(), VOCAB)
    return sum_by_copy(scores_NT2.view(len(rows), -1, 2), mask)


def test_a_copying_model_is_right_on_the_second_copy_only() -> None:
    """Its logits predict the token `LENGTH` positions back; they are uniform on the first copy."""
    rows, mask = sequences(range(8)), torch.tensor([True] * 7 + [False])
    logits = torch.zeros(8, 2 * LENGTH, VOCAB)
    for position in range(LENGTH, 2 * LENGTH):
        logits[torch.arange(8), position, rows[:, position + 1 - LENGTH]] = 100.0
    first, second = scores(logits, rows, mask).tolist()
    assert second == [pytest.approx(0, abs=1e-6), 7 * (LENGTH - 1), 7 * (LENGTH - 1)]
    assert first[0] == pytest.approx(7 * (LENGTH - 1) * np.log(VOCAB), rel=1e-6)
    assert first[1:] == [0, 7 * (LENGTH - 1)]


def test_a_model_that_copies_one_position_late_is_wrong() -> None:
    rows = sequences(range(8))
    logits = torch.zeros(8, 2 * LENGTH, VOCAB)
    for position in range(LENGTH, 2 * LENGTH):
        logits[torch.arange(8), position, rows[:, position - LENGTH]] = 100.0
    num_right = scores(logits, rows, torch.ones(8, dtype=torch.bool))[1, 1].item()
    assert num_right == (rows[:, LENGTH + 1 : -1] == rows[:, LENGTH + 2 :]).sum()


def test_vocabulary_padding_is_never_predicted() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 50], logits[0, 7] = 9.0, 5.0
    assert score_tokens(logits, torch.tensor([7]), 40)[0, 1] == 1
    assert score_tokens(logits, torch.tensor([7]), VOCAB)[0, 1] == 0


def test_the_sums_of_a_model_match_its_logits(alone: Any) -> None:
    model = tiny_model(alone)
    rows, mask = sequences(range(5)), torch.tensor([True, True, False, True, True])
    batches = [(rows[:3], mask[:3]), (rows[3:], mask[3:])]
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for row in rows[mask].tolist():
        log_p = full_logits(model, row[:-1]).log_softmax(-1).double()
        for copy in (0, 1):
            for position in range(copy * LENGTH + 1, (copy + 1) * LENGTH):
                token = row[position + 1]
                right = float(log_p[position].argmax() == token)
                expected[copy] += torch.tensor([-log_p[position, token].item(), right, 1])
    torch.testing.assert_close(measure_recall(model, batches, VOCAB), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("lengths", [[1], [16, 0]])
def test_lengths_below_two_are_rejected(lengths: list[int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 2"):
        validate({"stage": "evaluate", "checkpoint": {"load": str(tmp_path)}, "evaluate": {"recall_lengths": lengths}})
