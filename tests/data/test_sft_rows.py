"""Rows of packed conversations: nothing lost, nothing seen twice, nothing cut but by rule; tasks disjoint by text."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_q3n.config import UserError, validate
from megatron_q3n.config.sft import SftConfig, TaskSet
from megatron_q3n.data.chat_template import PLAIN, ChatTemplate
from megatron_q3n.data.conversation_tasks import place_of, questions
from megatron_q3n.data.conversations import Spelled
from megatron_q3n.data.sft_batches import SftData
from megatron_q3n.data.sft_rows import SftRows, SpelledSet, lay_out, pack, spelled_sets
from megatron_q3n.data.tokenizer import train_bpe

EOD = 0


def conversation(number: int, length: int) -> Spelled:
    tokens = np.full(length, number + 1, np.int64)
    return Spelled(tokens, np.linspace(0, 1, length, dtype=np.float32))


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 50))
@settings(max_examples=100, deadline=None)
def test_packing_takes_every_item_once_into_few_bins(sizes: list[int], capacity: int) -> None:
    bins = pack(sizes, capacity)
    assert sorted(i for chosen in bins for i in chosen) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in chosen) <= capacity for chosen in bins)
    assert sum(2 * sum(sizes[i] for i in chosen) <= capacity for chosen in bins) <= 1


@given(st.lists(st.integers(2, 17), min_size=1, max_size=40), st.sampled_from([1, 4]))
@settings(max_examples=30, deadline=None)
def test_a_pass_shows_every_prediction_once(lengths: list[int], alignment: int) -> None:
    items = [conversation(n, length) for n, length in enumerate(lengths)]
    rows = SftRows(SpelledSet.of(items, {}), 16, alignment, seed=1, eod=EOD)
    seen = []
    for number in range(len(rows)):
        batch = rows.batch(number)
        assert batch.cu_seqlens is not None
        bounds = batch.cu_seqlens.tolist()
        assert (bounds[0], bounds[-1]) == (0, 16)
        assert all((end - start) % alignment == 0 for start, end in itertools.pairwise(bounds))
        for start, end in itertools.pairwise(bounds):
            assert batch.position_ids_BT[0, start:end].tolist() == list(range(end - start))
            tokens, labels = batch.tokens_BT[0, start:end], batch.labels_BT[0, start:end]
            if tokens[0] == EOD:  # padding
                assert not batch.loss_mask_BT[0, start:end].any()
                continue
            length = int((labels != EOD).sum()) + 1
            item = items[int(tokens[0]) - 1]
            assert length == len(item.tokens)
            np.testing.assert_array_equal(batch.loss_mask_BT[0, start : start + length - 1], item.weights[1:])
            seen.append(int(tokens[0]) - 1)
    assert sorted(seen) == list(range(len(items)))


def test_passes_are_in_other_orders_and_repeat() -> None:
    spelled = SpelledSet.of([conversation(n, 9) for n in range(12)], {})
    rows = SftRows(spelled, 16, 1, seed=1, eod=EOD)
    first = [rows.batch(n).tokens_BT.tolist() for n in range(24)]
    again = SftRows(spelled, 16, 1, seed=1, eod=EOD)
    assert [again.batch(n).tokens_BT.tolist() for n in reversed(range(24))] == first[::-1]
    assert sorted(first[:12]) == sorted(first[12:])
    assert first[:12] != first[12:]


def test_empty_rows_are_legal() -> None:
    batch = lay_out([], 8, 1, EOD)
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 8]
    assert batch.num_loss_tokens == 0


def sets(folder: Path, length: int, **options: object) -> tuple[SpelledSet, SpelledSet]:
    """Spell three talks: one short, one long by its exchanges, one long by a single one."""
    exchange = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "goodbye"}]
    long = [{"role": "user", "content": "x" * 90}, {"role": "assistant", "content": "goodbye"}]
    rows = [{"messages": m} for m in (exchange, exchange * 4, long)]
    file = folder / "talks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = [{"path": str(file)}]
    config = SftConfig.model_validate({"train": source, "validation": source, **options})
    tokenizer = train_bpe(["user: assistant: hello goodbye"], 280)
    template = ChatTemplate(PLAIN, tokenizer)
    return spelled_sets(config, template, length, folder / "cache", tokenizer.fingerprint)


def test_too_long_conversations_go_by_the_rule(tmp_path: Path) -> None:
    short = len(sets(tmp_path, 500)[0][0].tokens)
    length = 2 * short
    dropped, _ = sets(tmp_path, length)
    assert dropped.counts == {"read": 3, "whole": 1, "dropped as too long": 2}
    turns, _ = sets(tmp_path, length, too_long="oldest_turns")
    assert turns.counts == {"read": 3, "whole": 1, "shortened by its oldest turns": 1, "dropped as too long": 1}
    assert len(turns[1].tokens) == 2 * short
    cut, _ = sets(tmp_path, length, too_long="cut")
    assert cut.counts == {"read": 3, "whole": 1, "cut at the end": 1, "dropped as nothing in it counts": 1}
    assert len(cut[1].tokens) == length + 1
    with pytest.raises(UserError, match=r"sft\.train: no conversation is left"):
        sets(tmp_path, 4)


def test_the_cache_is_used_and_follows_the_file(tmp_path: Path) -> None:
    first, _ = sets(tmp_path, 500)
    (stored,) = (tmp_path / "cache" / "conversations").glob("*.npz")
    before = stored.stat().st_mtime_ns
    again, _ = sets(tmp_path, 500)
    assert stored.stat().st_mtime_ns == before
    np.testing.assert_array_equal(first.tokens, again.tokens)
    sets(tmp_path, 400)
    assert len(list((tmp_path / "cache" / "conversations").glob("*.npz"))) == 2


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_every_layout_sees_the_same_global_batches(dp_size: int) -> None:
    config = validate(
        {
            "stage": "sft",
            "sft": {"train": [{"task": {"name": "chain_sum"}}]},
            "training": {"micro_batch_size": 1, "global_batch_size": 4, "sequence_length": 16, "steps": 5},
            "validation": {"batches": 9},
            "schedule": {"warmup_steps": 0},
        }
    )
    spelled = SpelledSet.of([conversation(n, 9) for n in range(11)], {})
    data = SftData.of(config, train_bpe(["a"], 257), spelled, spelled)

    def rows(method: str, *first: int) -> list[list[list[int]]]:
        ranks = [list(getattr(data, method)(*first, r, dp_size)) for r in range(dp_size)]
        return [sorted(b.tokens_BT[0].tolist() for rank in ranks for b in rank[step]) for step in range(len(ranks[0]))]

    alone = [
        sorted(data.train_rows.batch(step * 4 + i).tokens_BT[0].tolist() for i in range(4)) for step in range(2, 5)
    ]
    assert rows("train_batches", 2) == alone
    validation = [row for batch in rows("validation_batches") for row in batch if row[0] != EOD]
    every = [data.validation_rows.batch(i).tokens_BT[0].tolist() for i in range(6)]
    assert sorted(validation) == sorted(every), "each once, the rest padding"


def test_task_sets_of_disjoint_shares_share_no_text() -> None:
    chosen = {"name": "chain_sum", "settings": {"max_terms": 2, "min_digits": 2, "max_digits": 2}}
    shares = [(0.0, 0.45), (0.45, 0.9), (0.9, 1.0)]
    found = [
        questions(TaskSet(**chosen, size=500, seed=seed, first=first, last=last, distinct=seed == 2))
        for seed, (first, last) in enumerate(shares)
    ]
    texts = [{question.text for question in part} for part in found]
    assert all(not texts[a] & texts[b] for a, b in ((0, 1), (0, 2), (1, 2)))
    assert len(texts[2]) == 500
    assert all(shares[2][0] <= place_of(text) < shares[2][1] for text in texts[2])
    assert found[0] == questions(TaskSet(**chosen, size=500, seed=0, last=0.45))
    with pytest.raises(UserError, match=r"only \d+ of 9000 questions"):
        questions(TaskSet(**chosen, size=9000, first=0.9, distinct=True))
    with pytest.raises(UserError, match="Did you mean 'chain_sum'"):
        questions(TaskSet(name="chain_sums"))
