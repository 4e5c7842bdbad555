"""Skipped batches: every step still has one batch, the same whether or not the run was interrupted."""

from collections.abc import Iterator
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from megatron_q3n.health import batch_order
from megatron_q3n.health.batch_order import BatchOrder

STEPS = 20


def source(first: int) -> Iterator[int]:
    """Yield the numbers of batches, as PretrainData.train_batches yields batches."""
    assert 0 <= first < STEPS
    return iter(range(first, STEPS))


def taken(order: BatchOrder, first_step: int) -> list[int]:
    batches = order.batches(source, first_step)
    return [next(batches) for _ in range(first_step, STEPS)]


def test_without_skipped_batches_every_batch_comes_in_order() -> None:
    assert taken(BatchOrder([], STEPS), 0) == list(range(STEPS))


@given(st.sets(st.integers(0, STEPS - 1), max_size=8), st.integers(0, STEPS - 1))
def test_a_resumed_run_goes_on_with_the_same_batches(skipped: set[int], step: int) -> None:
    order = BatchOrder(sorted(skipped), STEPS)
    whole = taken(order, 0)
    assert taken(order, step) == whole[step:]
    assert not skipped & set(whole)
    kept = [number for number in range(STEPS) if number not in skipped]
    assert whole == (kept + kept)[:STEPS], "the missing ones are made up for from the beginning"


@given(st.sets(st.integers(0, STEPS - 1), max_size=8), st.integers(0, STEPS - 1))
def test_the_number_of_a_step_s_batch_is_known_beforehand(skipped: set[int], step: int) -> None:
    order = BatchOrder(sorted(skipped), STEPS)
    assert order.batch_of(step) % STEPS == taken(order, 0)[step]


def test_the_list_survives(tmp_path: Path) -> None:
    assert batch_order.read(tmp_path) == []
    entries = [{"step": 6, "batches": [5]}, {"step": 9, "batches": [9, 8]}]
    batch_order.write(tmp_path, entries)
    assert batch_order.skipped_batches(batch_order.read(tmp_path)) == [5, 8, 9]
