"""Shapes of conversations: ShareGPT and Alpaca rows, renamed columns, and source weights."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_q3n.config import UserError, validate
from megatron_q3n.config.rl import PromptSource, RlConfig
from megatron_q3n.config.sft import ConversationSource, SftConfig
from megatron_q3n.data.chat_template import PLAIN, ChatTemplate
from megatron_q3n.data.conversations import TokenizedConversation, parse_conversation
from megatron_q3n.data.sft import SftData
from megatron_q3n.data.source_weights import repeated
from megatron_q3n.data.tokenized_conversations import TokenizedConversations, read_source
from megatron_q3n.data.tokenizer import train_bpe
from megatron_q3n.rl.prompts import Prompts
from tests.data.test_sft_packing import EOD, conversation

SYSTEM, USER, ASSISTANT = (
    {"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2"))
)
CALL = {"name": "add", "arguments": {"a": 1}}
SHAREGPT: dict[str, Any] = {
    "system": "Be brief.",
    "tools": json.dumps([{"type": "function", "function": {"name": "add"}}]),
    "conversations": [
        {"from": "human", "value": "1 + 1?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "2", "weight": 0.5},
    ],
}


def test_sharegpt_and_alpaca_rows_are_conversations() -> None:
    read = parse_conversation(SHAREGPT, "here")
    assert read.messages == [
        SYSTEM,
        USER,
        {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "2"},
        ASSISTANT | {"weight": 0.5},
    ]
    assert read.tools == [{"type": "function", "function": {"name": "add"}}]
    assert parse_conversation({"conversations": [USER, ASSISTANT]}, "here").messages == [USER, ASSISTANT]
    row = {"instruction": "Add.", "input": "1 + 1?", "output": "2", "system": "Be brief.", "history": [["a", "b"]]}
    assert parse_conversation(row, "here").messages == [
        SYSTEM,
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "Add.\n1 + 1?"},
        ASSISTANT,
    ]
    plain = {"instruction": "1 + 1?", "input": "", "output": "2", "system": None, "history": None}
    assert parse_conversation(plain, "here").messages == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "no conversation; it must be .*conversations.*instruction"),
        ({"conversations": [{"from": "me", "value": "a"}]}, "a turn is from 'me'; it must be one of human"),
        ({"conversations": ["hello"]}, "a message is no JSON object"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "function_call is not JSON"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "must be a string"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input is int, not text"),
        ({"instruction": "a", "output": None}, "no message of role assistant"),
        ({"instruction": "a", "output": "b", "history": ["ab", "abc"]}, "history must hold pairs"),
        ({"instruction": "a", "output": "b", "system": 1}, "system is int"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"here: .*{message}"):
        parse_conversation(row, "here")


def test_columns_of_a_file_get_our_names(tmp_path: Path) -> None:
    file = tmp_path / "qa.parquet"
    pq.write_table(pa.table({"question": ["1 + 1?"], "reply": ["2"], "input": ["unused"]}), file)
    columns = {"instruction": "question", "output": "reply"}
    (read,) = read_source(ConversationSource(path=str(file), columns=columns | {"input": "input"}))
    assert read.messages == [{"role": "user", "content": "1 + 1?\nunused"}, ASSISTANT]
    with pytest.raises(
        UserError, match=r"qa\.parquet:1: no column 'repl'\. Did you mean 'reply'\? Columns here: quest"
    ):
        list(read_source(ConversationSource(path=str(file), columns=columns | {"output": "repl"})))
    with pytest.raises(ValueError, match=r"columns has 'instructions'\. Did you mean 'instruction'"):
        SftConfig.model_validate({"train": [{"path": "a", "columns": {"instructions": "question"}}]})
    for section, settings in ((SftConfig, "train"), (RlConfig, "prompts")):
        source = {"task": {"name": "chain_sum"}, "columns": {"output": "reply"}}
        with pytest.raises(ValueError, match="no effect with a task set"):
            section.model_validate({settings: [source]})
    for section, settings in ((SftConfig, "validation"), (RlConfig, "held_out")):
        with pytest.raises(ValueError, match=rf"{settings}: weight=2\.0 has no effect"):
            section.model_validate({settings: [{"path": "a", "weight": 2}]})


@given(st.integers(1, 30), st.floats(0.01, 5))
def test_weights_repeat_a_source(count: int, weight: float) -> None:
    found = Counter(repeated(list(range(count)), weight, "web"))
    assert set(found.values()) <= {int(weight), int(weight) + 1}
    assert abs(sum(found.values()) - weight * count) <= 1
    assert found == Counter(repeated(list(range(count)), weight, "web"))


def test_an_epoch_has_each_source_by_its_weight() -> None:
    sources = [{"path": "web.jsonl", "weight": 2}, {"path": "code.jsonl", "weight": 0.5}]
    config = validate(
        {
            "stage": "sft",
            "sft": {"train": sources},
            "training": {"micro_batch_size": 1, "global_batch_size": 2, "sequence_length": 16, "steps": 5},
            "schedule": {"warmup_steps": 0},
        }
    )
    items: list[TokenizedConversation] = [conversation(n, 9) for n in range(10)]
    train = TokenizedConversations.of(items, {}, [0, 0, 0, 0, 1, 1, 1, 1, 1, 1], ("web", "code"))
    data = SftData.of(config, train_bpe(["a"], 257), train, train)
    rows = [data.train_dataset.batch(number) for number in range(len(data.train_dataset))]
    counts = Counter(token for row in rows for token in row.tokens_BT[0].tolist() if token != EOD)
    assert {counts[token] for token in (1, 2, 3, 4)} == {16}
    assert sorted(counts[token] for token in range(5, 11)) == [0, 0, 0, 8, 8, 8]
    assert len(data.validation_dataset) == 5


def test_prompts_of_every_shape(tmp_path: Path) -> None:
    tokenizer = train_bpe(["user"], 270)
    rows: list[dict[str, Any]] = [
        {"instruction": "1 + 1?", "output": "2", "level": 3},
        {"conversations": SHAREGPT["conversations"][:1] + SHAREGPT["conversations"][3:]},
        {"problem": "1 + 1?", "solution": "2"},
    ]
    expected = [
        {"answer": "2", "instruction": "1 + 1?", "output": "2", "level": 3, "text": "1 + 1?"},
        {"answer": "2", "text": "1 + 1?"},
        {"answer": "2", "prompt": "1 + 1?", "text": "1 + 1?"},
    ]
    columns = [{}, {}, {"prompt": "problem", "answer": "solution"}]
    for row, arguments, mapping in zip(rows, expected, columns, strict=True):
        (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
        source = PromptSource(path=str(tmp_path / "a.jsonl"), columns=mapping, weight=3)
        prompts = Prompts([source], ChatTemplate(PLAIN, tokenizer), max_tokens=50, seed=1)
        assert len(prompts) == 3
        assert prompts[0].scoring_arguments == arguments
        assert tokenizer.decode(prompts[0].tokens) == "user:\n1 + 1?<|endoftext|>\nassistant:\n"
