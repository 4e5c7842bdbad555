"""The recall probe: its rows, its counting, and a model's numbers against a plain computation over whole logits.

Two ranks: tests/stages/test_evaluate.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_q3n.config import UserError, validate
from megatron_q3n.evaluation.recall import by_copy, judged, measure_recall, repeated_rows
from tests.inference.tiny_model import full_logits, tiny_model

VOCAB, EOD, LENGTH = 64, 0, 9


def rows_of(numbers: range, seed: int = 1, length: int = LENGTH) -> torch.Tensor:
    text = np.array([EOD, *range(10, 40), EOD] * 4)
    return repeated_rows(text, EOD, length, numbers, seed)


def test_a_row_is_the_same_tokens_of_the_text_twice_behind_a_documents_end() -> None:
    rows = rows_of(range(50))
    assert rows.shape == (50, 2 * LENGTH + 1)
    assert rows[:, 0].eq(EOD).all()
    assert torch.equal(rows[:, 1 : LENGTH + 1], rows[:, LENGTH + 1 :])
    assert set(rows[:, 1:].flatten().tolist()) <= set(range(10, 40))


def test_a_row_depends_on_its_number_length_and_seed_alone() -> None:
    """So replicas that share the rows out measure what one would."""
    rows = rows_of(range(6))
    assert torch.equal(rows[4:], rows_of(range(4, 6)))
    assert len({tuple(row.tolist()) for row in rows}) == 6
    assert not torch.equal(rows, rows_of(range(6), seed=2))


def scores(logits_NTV: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    found = judged(logits_NTV.flatten(0, 1), rows[:, 1:].flatten(), VOCAB)
    return by_copy(found.view(len(rows), -1, 2), counts)


def test_a_model_that_copies_is_right_on_the_second_copy_alone() -> None:
    """Its logits say the token `LENGTH` places back; on the first copy it knows nothing."""
    rows, counts = rows_of(range(8)), torch.tensor([True] * 7 + [False])
    logits = torch.zeros(8, 2 * LENGTH, VOCAB)
    for place in range(LENGTH, 2 * LENGTH):
        logits[torch.arange(8), place, rows[:, place + 1 - LENGTH]] = 100.0
    first, second = scores(logits, rows, counts).tolist()
    assert second == [pytest.approx(0, abs=1e-6), 7 * (LENGTH - 1), 7 * (LENGTH - 1)]
    assert first[0] == pytest.approx(7 * (LENGTH - 1) * np.log(VOCAB), rel=1e-6)
    assert first[1:] == [0, 7 * (LENGTH - 1)]


def test_a_model_that_is_one_place_late_is_wrong() -> None:
    rows = rows_of(range(8))
    logits = torch.zeros(8, 2 * LENGTH, VOCAB)
    for place in range(LENGTH, 2 * LENGTH):
        logits[torch.arange(8), place, rows[:, place - LENGTH]] = 100.0
    late = scores(logits, rows, torch.ones(8, dtype=torch.bool))[1, 1].item()
    assert late == (rows[:, LENGTH + 1 : -1] == rows[:, LENGTH + 2 :]).sum()


def test_padding_of_the_vocabulary_is_never_the_answer() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 50], logits[0, 7] = 9.0, 5.0
    assert judged(logits, torch.tensor([7]), 40)[0, 1] == 1
    assert judged(logits, torch.tensor([7]), VOCAB)[0, 1] == 0


def test_a_models_sums_are_those_of_its_logits(alone: Any) -> None:
    model = tiny_model(alone)
    rows, counts = rows_of(range(5)), torch.tensor([True, True, False, True, True])
    batches = [(rows[:3], counts[:3]), (rows[3:], counts[3:])]
    wanted = torch.zeros(2, 3, dtype=torch.float64)
    for row in rows[counts].tolist():
        log_p = full_logits(model, row[:-1]).log_softmax(-1).double()
        for copy in (0, 1):
            for place in range(copy * LENGTH + 1, (copy + 1) * LENGTH):
                token = row[place + 1]
                right = float(log_p[place].argmax() == token)
                wanted[copy] += torch.tensor([-log_p[place, token].item(), right, 1])
    torch.testing.assert_close(measure_recall(model, batches, VOCAB), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("lengths", [[1], [16, 0]])
def test_lengths_without_anything_to_recall_are_refused(lengths: list[int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 2"):
        validate({"stage": "evaluate", "checkpoint": {"load": str(tmp_path)}, "evaluate": {"recall_lengths": lengths}})
