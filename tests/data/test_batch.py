"""Packing of documents into one sequence."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_q3n.data.batch import Batch, causal_batch, packed_batch
from megatron_q3n.packing import Packing

EOD = 0


@given(st.lists(st.integers(0, 4), min_size=3, max_size=40))
def test_documents_end_after_each_eod_and_do_not_attend_to_each_other(row: list[int]) -> None:
    text = torch.tensor(row)
    tokens, labels = text[None, :-1], text[None, 1:]
    batch = packed_batch(tokens, labels, torch.ones(1, len(row) - 1), EOD)
    assert batch.packing is not None
    edges = list(batch.packing.offsets)
    assert batch.packing.cu_seqlens.dtype == torch.int32
    length = len(row) - 1
    inner = [i + 1 for i in range(length - 1) if row[i] == EOD]
    assert edges == [0, *inner, length]
    assert batch.packing.longest == max(b - a for a, b in itertools.pairwise(edges))
    position = 0
    for i in range(length):
        assert batch.position_ids_BT[0, i] == position
        position = 0 if row[i] == EOD else position + 1
        assert batch.loss_mask_BT[0, i] == (0 if row[i] == EOD else 1)
    assert batch.num_loss_tokens == length - row[:-1].count(EOD)


def test_a_masked_position_stays_masked() -> None:
    tokens, labels = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])
    batch = packed_batch(tokens, labels, torch.tensor([[1.0, 0.0, 1.0]]), EOD)
    assert batch.loss_mask_BT.tolist() == [[1.0, 0.0, 1.0]]


def test_causal_sequences() -> None:
    tokens = torch.arange(6).view(2, 3)
    batch = causal_batch(tokens, tokens + 1, torch.ones(2, 3))
    assert batch.position_ids_BT.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.packing is None
    assert int(batch.num_loss_tokens) == 6


def test_moving_keeps_everything() -> None:
    tokens = torch.tensor([[1, EOD, 3]])
    batch = packed_batch(tokens, tokens, torch.ones(1, 3), EOD)
    moved = batch.to("meta")
    assert moved.tokens_BT.device.type == moved.packing.cu_seqlens.device.type == "meta"  # type: ignore[union-attr]
    assert moved.packing.longest == batch.packing.longest == 2  # type: ignore[union-attr]


def test_a_packed_batch_has_one_sequence() -> None:
    two = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(AssertionError, match="one sequence"):
        Batch(two, two, two.float(), two, Packing.of([0, 6]))


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) >= 16),
    st.sampled_from([1, 2, 4, 8]),
)
def test_aligned_documents_keep_their_tokens_in_order(lengths: list[int], alignment: int) -> None:
    """Documents start at multiples; tokens and labels with a loss are the unaligned ones, until truncation."""
    tokens = torch.cat([torch.tensor([*range(1, n), 0]) for n in lengths])[:16][None]
    labels, mask = tokens + 100, torch.ones(1, 16)
    plain = packed_batch(tokens, labels, mask, eod=0)
    aligned = packed_batch(tokens, labels, mask, eod=0, alignment=alignment)
    assert aligned.packing is not None
    assert all(offset % alignment == 0 for offset in aligned.packing.offsets)
    assert aligned.tokens_BT.shape == (1, 16)
    has_loss = aligned.loss_mask_BT.bool()
    expected = plain.loss_mask_BT.bool()
    kept = int(has_loss.sum())
    assert aligned.tokens_BT[has_loss].tolist() == plain.tokens_BT[expected].tolist()[:kept]
    assert aligned.labels_BT[has_loss].tolist() == plain.labels_BT[expected].tolist()[:kept]
    assert aligned.position_ids_BT[has_loss].tolist() == plain.position_ids_BT[expected].tolist()[:kept]
    if alignment == 1:
        assert kept == int(expected.sum())
