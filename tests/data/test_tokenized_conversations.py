"""Tokenized conversations: the held-out share of large and small sets, and sources that leave nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_q3n.config import UserError
from megatron_q3n.config.rl import PromptSource
from megatron_q3n.config.sft import SftConfig
from megatron_q3n.data.chat_template import PLAIN, ChatTemplate
from megatron_q3n.data.held_out import held_out_mask
from megatron_q3n.data.tokenized_conversations import TokenizedConversations, source_names, tokenized_conversations
from megatron_q3n.data.tokenizer import train_bpe
from megatron_q3n.rl.prompts import Prompts

FRACTIONS = st.floats(0, 1, exclude_max=True)


@given(st.lists(FRACTIONS, min_size=1), FRACTIONS, st.none() | st.integers(1, 5))
def test_a_share_is_held_out_by_text(fractions: list[float], share: float, most: int | None) -> None:
    mask = held_out_mask(fractions, share, most)
    held_out, kept = ({f for f, m in zip(fractions, mask) if m == side} for side in (True, False))
    assert not held_out & kept, "equal texts are on one side"
    assert kept
    assert bool(held_out) == (len(set(fractions)) > 1)
    below = {fraction for fraction in fractions if fraction < share}
    if below and kept - below and most is None:
        assert held_out == below
    assert len(held_out) <= (most or len(fractions))


def sets_of(
    folder: Path, texts: list[str], length: int = 400, **settings: Any
) -> tuple[TokenizedConversations, TokenizedConversations]:
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]} for text in texts
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SftConfig.model_validate({"train": [{"path": str(folder / "talks.jsonl")}], **settings})
    tokenizer = train_bpe(["user: assistant: yes"], 280)
    template = ChatTemplate(PLAIN, tokenizer)
    return tokenized_conversations(config, template, length, folder / "cache", tokenizer.fingerprint)


@pytest.mark.parametrize("count", [2, 10, 400])
def test_small_sets_have_validation_too(tmp_path: Path, count: int) -> None:
    train, validation = sets_of(tmp_path, [f"say {n}" for n in range(count)])
    assert len(train) + len(validation) == count
    assert len(validation) >= 1
    assert count < 400 or 8 <= len(validation) <= 40
    assert validation.counts == {"held out, 5 % of sft.train": len(validation)}
    assert train.counts == {"read": count, "whole": count, "held out": len(validation)}


def test_what_is_held_out_fits(tmp_path: Path) -> None:
    """Only conversations that fit are split: the only two short ones are on two sides."""
    train, validation = sets_of(tmp_path, ["a", "b", *(f"{n}" * 500 for n in range(9))], length=40)
    assert (len(train), len(validation)) == (1, 1)
    assert train.counts["dropped as too long"] == 9


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        (["same"] * 3, {}, r"its 3 conversation\(s\) have one text.*give others, or sft\.validation"),
        (
            ["x" * 900] * 2,
            {},
            r"no conversation is left \(2 read, 2 dropped as too long\); raise training\.sequence_len",
        ),
        (["x" * 900] * 2, {"too_long": "cut"}, r"2 dropped as without loss tokens\); give assistant's turns a weight"),
    ],
)
def test_the_advice_fits_the_cause(tmp_path: Path, texts: list[str], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"sft\.train: .*{message}"):
        sets_of(tmp_path, texts, length=40, **settings)


def test_sources_have_distinct_names() -> None:
    sources = [
        {"path": "a/web.jsonl.gz"},
        {"path": "b/web.parquet"},
        {"task": {"name": "chain_sum"}},
        {"path": "数/ä.x"},
    ]
    names = source_names(SftConfig.model_validate({"train": sources}).train)
    assert names == ("web", "web_2", "chain_sum", "_")


def test_prompts_hold_out_a_share(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    template = ChatTemplate(PLAIN, train_bpe(["user"], 270))

    def part(name: Any, count: int) -> set[str]:
        file.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(count)))
        prompts = Prompts(
            [PromptSource(path=str(file))], template, max_tokens=50, seed=1, part=name, held_out_percent=5.0
        )
        return {prompt.scoring_arguments["text"] for prompt in prompts.take(0, len(prompts))}

    for count in (2, 10, 200):
        train, held_out = part("train", count), part("held_out", count)
        assert len(train) + len(held_out) == count == len(train | held_out)
        assert held_out
    with pytest.raises(UserError, match=r"none can be held out.*rl\.held_out_percent=0"):
        part("held_out", 1)
