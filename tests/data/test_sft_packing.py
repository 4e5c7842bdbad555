"""Sequence packing of conversations: each once per epoch, truncated by rule only; task sets disjoint by text."""

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
from megatron_q3n.data.conversation_tasks import questions
from megatron_q3n.data.conversations import TokenizedConversation
from megatron_q3n.data.held_out import hash_fraction
from megatron_q3n.data.sft import SftData
from megatron_q3n.data.sft_packing import PackedConversations, best_fit_decreasing, pack
from megatron_q3n.data.tokenized_conversations import TokenizedConversations, tokenized_conversations
from megatron_q3n.data.tokenizer import train_bpe

EOD = 0


def conversation(number: int, length: int) -> TokenizedConversation:
    tokens = np.full(length, number + 1, np.int64)
    return TokenizedConversation(tokens, np.linspace(0, 1, length, dtype=np.float32))


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 50))
@settings(max_examples=100, deadline=None)
def test_packing_takes_every_item_once_into_few_bins(sizes: list[int], capacity: int) -> None:
    bins = best_fit_decreasing(sizes, capacity)
    assert sorted(i for chosen in bins for i in chosen) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in chosen) <= capacity for chosen in bins)
    assert sum(2 * sum(sizes[i] for i in chosen) <= capacity for chosen in bins) <= 1


@given(st.lists(st.integers(2, 17), min_size=1, max_size=40), st.sampled_from([1, 4]))
@settings(max_examples=30, deadline=None)
def test_an_epoch_has_every_prediction_once(lengths: list[int], alignment: int) -> None:
    items = [conversation(n, length) for n, length in enumerate(lengths)]
    rows = PackedConversations(TokenizedConversations.of(items, {}), 16, alignment, seed=1, eod=EOD)
    seen = []
    for number in range(len(rows)):
        batch = rows.batch(number)
        assert batch.packing is not None
        bounds = list(batch.packing.offsets)
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


def test_epochs_are_permutations_and_reproducible() -> None:
    conversations = TokenizedConversations.of([conversation(n, 9) for n in range(12)], {})
    rows = PackedConversations(conversations, 16, 1, seed=1, eod=EOD)
    first = [rows.batch(n).tokens_BT.tolist() for n in range(24)]
    again = PackedConversations(conversations, 16, 1, seed=1, eod=EOD)
    assert [again.batch(n).tokens_BT.tolist() for n in reversed(range(24))] == first[::-1]
    assert sorted(first[:12]) == sorted(first[12:])
    assert first[:12] != first[12:]


def test_an_empty_sequence_is_padding_only() -> None:
    batch = pack([], 8, 1, EOD)
    assert batch.packing is not None
    assert batch.packing.offsets == (0, 8)
    assert batch.num_loss_tokens == 0


def tokenized_sets(
    folder: Path, length: int, **options: object
) -> tuple[TokenizedConversations, TokenizedConversations]:
    """Tokenize three conversations: a short one, one with many exchanges, and one with a single long message."""
    exchange = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "goodbye"}]
    long = [{"role": "user", "content": "x" * 90}, {"role": "assistant", "content": "goodbye"}]
    rows = [{"messages": m} for m in (exchange, exchange * 4, long)]
    file = folder / "talks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = [{"path": str(file)}]
    config = SftConfig.model_validate({"train": source, "validation": source, **options})
    tokenizer = train_bpe(["user: assistant: hello goodbye"], 280)
    template = ChatTemplate(PLAIN, tokenizer)
    return tokenized_conversations(config, template, length, folder / "cache", tokenizer.fingerprint)


def test_too_long_conversations_go_by_the_rule(tmp_path: Path) -> None:
    short = len(tokenized_sets(tmp_path, 500)[0][0].tokens)
    length = 2 * short
    dropped, _ = tokenized_sets(tmp_path, length)
    assert dropped.counts == {"read": 3, "whole": 1, "dropped as too long": 2}
    turns, _ = tokenized_sets(tmp_path, length, too_long="oldest_turns")
    assert turns.counts == {"read": 3, "whole": 1, "shortened by its oldest turns": 1, "dropped as too long": 1}
    assert len(turns[1].tokens) == 2 * short
    cut, _ = tokenized_sets(tmp_path, length, too_long="cut")
    assert cut.counts == {"read": 3, "whole": 1, "cut at the end": 1, "dropped as without loss tokens": 1}
    assert len(cut[1].tokens) == length + 1
    with pytest.raises(UserError, match=r"sft\.train: no conversation is left"):
        tokenized_sets(tmp_path, 4)


def test_the_cache_is_used_and_follows_the_file(tmp_path: Path) -> None:
    first, _ = tokenized_sets(tmp_path, 500)
    (stored,) = (tmp_path / "cache" / "conversations").glob("*.npz")
    before = stored.stat().st_mtime_ns
    again, _ = tokenized_sets(tmp_path, 500)
    assert stored.stat().st_mtime_ns == before
    np.testing.assert_array_equal(first.tokens, again.tokens)
    tokenized_sets(tmp_path, 400)
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
    conversations = TokenizedConversations.of([conversation(n, 9) for n in range(11)], {})
    data = SftData.of(config, train_bpe(["a"], 257), conversations, conversations)

    def rows(method: str, *first: int) -> list[list[list[int]]]:
        ranks = [list(getattr(data, method)(*first, r, dp_size)) for r in range(dp_size)]
        return [sorted(b.tokens_BT[0].tolist() for rank in ranks for b in rank[step]) for step in range(len(ranks[0]))]

    alone = [
        sorted(data.train_dataset.batch(step * 4 + i).tokens_BT[0].tolist() for i in range(4)) for step in range(2, 5)
    ]
    assert rows("train_batches", 2) == alone
    validation = [row for batch in rows("validation_batches") for row in batch if row[0] != EOD]
    every = [data.validation_dataset.batch(i).tokens_BT[0].tolist() for i in range(6)]
    assert sorted(validation) == sorted(every), "each sequence once, the rest padding"


def test_validation_by_source_has_each_sources_own_sequences() -> None:
    config = validate(
        {
            "stage": "sft",
            "sft": {"train": [{"task": {"name": "chain_sum"}}]},
            "training": {"micro_batch_size": 1, "global_batch_size": 2, "sequence_length": 16, "steps": 5},
            "validation": {"batches": 20},
            "schedule": {"warmup_steps": 0},
        }
    )
    items = [conversation(n, 9) for n in range(7)]
    mixed = TokenizedConversations.of(items, {}, [0, 1, 0, 1, 1, 1, 0], ("web", "code", "none"))
    alone = TokenizedConversations.of(items, {})
    data = SftData.of(config, train_bpe(["a"], 257), alone, mixed)
    found = {name: tokens_of(data, name) for name, _ in data.validation_sources(0, 2)}
    assert found == {"web": [1, 3, 7], "code": [2, 4, 5, 6]}
    assert "3 from web, 4 from code" in data.describe()["validation"][0]["path"]
    assert list(SftData.of(config, train_bpe(["a"], 257), alone, alone).validation_sources(0, 1)) == []


def tokens_of(data: SftData, source: str) -> list[int]:
    """Return the distinct tokens of a source on both of two ranks, without padding."""
    batches = [b for rank in range(2) for step in dict(data.validation_sources(rank, 2))[source] for b in step]
    return sorted({token for batch in batches for token in batch.tokens_BT[0].tolist()} - {EOD})


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
    assert all(shares[2][0] <= hash_fraction(text) < shares[2][1] for text in texts[2])
    assert found[0] == questions(TaskSet(**chosen, size=500, seed=0, last=0.45))
    with pytest.raises(UserError, match=r"only \d+ of 9000 questions"):
        questions(TaskSet(**chosen, size=9000, first=0.9, distinct=True))
    with pytest.raises(UserError, match="Did you mean 'chain_sum'"):
        questions(TaskSet(name="chain_sums"))
