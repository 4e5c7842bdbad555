"""Packing: offsets on the host and what is derived from them, against the definitions written out."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_q3n.packing import Packing

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum)


def packing_of(lengths: list[int]) -> Packing:
    return Packing.of([0, *itertools.accumulate(lengths)])


@given(LENGTHS)
def test_positions_and_documents(lengths: list[int]) -> None:
    packing = packing_of(lengths)
    assert packing.lengths == tuple(lengths)
    assert packing.longest == max(lengths)
    assert (packing.num_tokens, packing.num_documents) == (sum(lengths), len(lengths))
    assert packing.position_T.tolist() == [i for length in lengths for i in range(length)]
    assert packing.document_T.tolist() == [d for d, length in enumerate(lengths) for _ in range(length)]
    assert packing.cu_seqlens.tolist() == list(packing.offsets)
    assert (packing.cu_seqlens.dtype, packing.position_T.dtype) == (torch.int32, torch.int32)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(sum), st.integers(1, 3))
def test_zigzag_gives_each_rank_an_early_and_a_late_chunk_of_every_document(lengths: list[int], size: int) -> None:
    packing = packing_of([2 * size * length for length in lengths])
    held = packing.zigzag(size)
    assert sorted(held.flatten().tolist()) == list(range(packing.num_tokens))
    for rank in range(size):
        expected = []
        for (start, _), chunk in zip(packing.spans, lengths):
            for number in (rank, 2 * size - 1 - rank):
                expected += range(start + number * chunk, start + (number + 1) * chunk)
        assert held[rank].tolist() == expected
    chunks = packing.chunks_of_rank(size)
    assert chunks.lengths == tuple(length for length in lengths for _ in range(2))


def test_a_document_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match=r"6 tokens cannot be cut into 2 × 2 equal chunks; set data\.document"):
        packing_of([4, 6]).zigzag(2)


@pytest.mark.parametrize("offsets", [[], [0], [1, 4], [0, 5, 3]])
def test_offsets_that_do_not_rise_from_zero_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="must rise from 0"):
        Packing.of(offsets)


def test_on_another_device_the_host_offsets_are_the_same() -> None:
    packing = packing_of([2, 3])
    moved = packing.to("meta")
    assert moved.offsets == packing.offsets
    assert moved.cu_seqlens.device.type == "meta"
