"""Tokenized conversations of a run: read from the sources, split into training and validation, and cached.

No conversation is truncated but by the rule of `sft.too_long`. Without `sft.validation` a share of the conversations
that are left is held out. The result is cached under a hash of everything it depends on.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_q3n.config import UserError
from megatron_q3n.config.sft import ConversationSource, SftConfig
from megatron_q3n.data.chat_template import ChatTemplate
from megatron_q3n.data.content_digest import content_digest
from megatron_q3n.data.conversation_tasks import task_conversations
from megatron_q3n.data.conversations import (
    Conversation,
    TokenizedConversation,
    apply_chat_template,
    read_conversations,
    without_oldest_exchange,
)
from megatron_q3n.data.held_out import hash_fraction, held_out_mask
from megatron_q3n.data.source_names import distinct_names
from megatron_q3n.data.sources import find_row_sources

# version of the cached files, part of their key: raise it when their layout changes
CACHE_VERSION = 3
TOO_LONG, NO_LOSS = "dropped as too long", "dropped as without loss tokens"


@dataclass
class TokenizedConversations:
    """Tokenized conversations, concatenated; `counts` holds the number of conversations by outcome.

    `source_names` are the sources they come from, and `sources` the index of each one's.
    Shapes: tokens, weights (all tokens,); bounds (conversations + 1,); sources (conversations,).
    """

    tokens: np.ndarray
    weights: np.ndarray
    bounds: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)
    sources: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    source_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> TokenizedConversation:
        span = slice(self.bounds[index], self.bounds[index + 1])
        return TokenizedConversation(self.tokens[span], self.weights[span])

    @classmethod
    def of(
        cls,
        items: list[TokenizedConversation],
        counts: dict[str, int],
        sources: Sequence[int] | None = None,
        source_names: tuple[str, ...] = ("",),
    ) -> "TokenizedConversations":
        """Concatenate conversations; without `sources` they are of one."""
        empty = TokenizedConversation(np.empty(0, np.int64), np.empty(0, np.float32))
        return cls(
            np.concatenate([x.tokens for x in [empty, *items]]).astype(np.int32),
            np.concatenate([x.weights for x in [empty, *items]]),
            np.cumsum([0, *(len(x.tokens) for x in items)]),
            counts,
            np.array([0] * len(items) if sources is None else sources, np.int64),
            source_names,
        )

    def select(self, indices: Sequence[int], counts: dict[str, int]) -> "TokenizedConversations":
        """Return some of the conversations."""
        sources = [int(self.sources[index]) for index in indices]
        return TokenizedConversations.of([self[index] for index in indices], counts, sources, self.source_names)

    def indices_by_source(self) -> dict[str, list[int]]:
        """Return the indices of the conversations of each source that has any, by its name."""
        found = {name: np.flatnonzero(self.sources == n).tolist() for n, name in enumerate(self.source_names)}
        return {name: indices for name, indices in found.items() if indices}


def tokenized_conversations(
    settings: SftConfig, template: ChatTemplate, length: int, cache: Path, fingerprint: str
) -> tuple[TokenizedConversations, TokenizedConversations]:
    """Return training and validation conversations, read from the cache if present.

    Raises: UserError for invalid conversations, or if no conversation is left after filtering.
    """
    key = _cache_key(settings, template, length, fingerprint)
    file = cache / "conversations" / f"{key}.npz"
    if not file.is_file():
        train, validation = _tokenize_all(settings, template, length)
        _write(file, train, validation)
    return _read(file)


def read_source(source: ConversationSource) -> Iterator[Conversation]:
    """Yield the conversations of a source, in order."""
    if source.task is not None:
        yield from task_conversations(source.task)
    else:
        assert source.path is not None, "checked by the configuration"
        yield from read_conversations(source.path, source.columns)


def source_names(sources: list[ConversationSource]) -> tuple[str, ...]:
    """Return a distinct name for each source: that of its task set, or of its file without suffixes."""
    return distinct_names(
        source.task.name if source.task is not None else Path(str(source.path)).name.split(".")[0] for source in sources
    )


def _tokenize_all(
    settings: SftConfig, template: ChatTemplate, length: int
) -> tuple[TokenizedConversations, TokenizedConversations]:
    train, fractions = _tokenize("sft.train", settings.train, settings, template, length)
    if settings.validation:
        return train, _tokenize("sft.validation", settings.validation, settings, template, length)[0]
    mask = held_out_mask(fractions, settings.validation_percent / 100)
    if not any(mask):
        raise UserError(
            f"sft.train: its {len(train)} conversation(s) have one text, so that none can be held out for validation; "
            "give others, or sft.validation."
        )
    kept, held_out = ([i for i, is_held_out in enumerate(mask) if is_held_out == side] for side in (False, True))
    percent = f"held out, {settings.validation_percent:g} % of sft.train"
    return (
        train.select(kept, train.counts | {"held out": len(held_out)}),
        train.select(held_out, {percent: len(held_out)}),
    )


def _tokenize(
    setting: str, sources: list[ConversationSource], settings: SftConfig, template: ChatTemplate, length: int
) -> tuple[TokenizedConversations, list[float]]:
    """Return the conversations of some sources that fit, and the hash of each one's text.

    Raises: UserError if there is none.
    """
    counts: Counter[str] = Counter()
    items: list[TokenizedConversation] = []
    fractions: list[float] = []
    indices: list[int] = []
    for index, source in enumerate(sources):
        for conversation in read_source(source):
            counts["read"] += 1
            item, outcome = _fit(conversation, settings, template, length + 1)
            counts[outcome] += 1
            if item is not None:
                items.append(item)
                indices.append(index)
                fractions.append(hash_fraction(json.dumps(conversation.messages, sort_keys=True)))
    if not items:
        raise UserError(_none_left(setting, counts, length))
    return TokenizedConversations.of(items, dict(counts), indices, source_names(sources)), fractions


def _none_left(setting: str, counts: Counter[str], length: int) -> str:
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "the sources hold none"
    advice = []
    if counts[TOO_LONG]:
        advice.append(f"raise training.sequence_length={length} or choose another rule with sft.too_long")
    if counts[NO_LOSS]:
        advice.append("give assistant's turns a weight above 0, within the sequence length")
    return f"{setting}: no conversation is left ({outcomes}); {', or '.join(advice) or 'give others'}."


def _fit(
    conversation: Conversation, settings: SftConfig, template: ChatTemplate, max_tokens: int
) -> tuple[TokenizedConversation | None, str]:
    """Tokenize a conversation into at most `max_tokens` by the rule of `sft.too_long`; also return the outcome."""
    item, outcome = apply_chat_template(conversation, template, settings.turns), "whole"
    if len(item.tokens) > max_tokens and settings.too_long == "drop":
        return None, TOO_LONG
    if len(item.tokens) > max_tokens and settings.too_long == "cut":
        item, outcome = TokenizedConversation(item.tokens[:max_tokens], item.weights[:max_tokens]), "cut at the end"
    shorter: Conversation | None = conversation
    while len(item.tokens) > max_tokens:
        shorter, outcome = without_oldest_exchange(shorter) if shorter else None, "shortened by its oldest turns"
        if shorter is None:
            return None, TOO_LONG
        item = apply_chat_template(shorter, template, settings.turns)
    if not item.weights[1:].any():
        return None, NO_LOSS
    return item, outcome


def _cache_key(settings: SftConfig, template: ChatTemplate, length: int, fingerprint: str) -> str:
    files = {
        source.path: [content_digest(file.path) for file in find_row_sources(source.path)]
        for source in [*settings.train, *settings.validation]
        if source.path is not None
    }
    identity: dict[str, Any] = {
        "layout": CACHE_VERSION,
        "settings": settings.model_dump(mode="json"),
        "files": files,
        "template": [template.source, template.named_tokens],
        "length": length,
        "tokenizer": fingerprint,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


_ARRAYS = ("tokens", "weights", "bounds", "sources")


def _write(file: Path, train: TokenizedConversations, validation: TokenizedConversations) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.stem}.{os.getpid()}.npz")
    sets = {"train": train, "validation": validation}
    arrays = {f"{name}_{array}": getattr(part, array) for name, part in sets.items() for array in _ARRAYS}
    facts = np.array(json.dumps({name: [part.counts, part.source_names] for name, part in sets.items()}))
    np.savez(partial, allow_pickle=False, facts=facts, **arrays)
    os.replace(partial, file)


def _read(file: Path) -> tuple[TokenizedConversations, TokenizedConversations]:
    with np.load(file, allow_pickle=False) as stored:
        facts = json.loads(str(stored["facts"]))
        train, validation = (
            TokenizedConversations(
                counts=facts[name][0],
                source_names=tuple(facts[name][1]),
                **{array: stored[f"{name}_{array}"] for array in _ARRAYS},
            )
            for name in ("train", "validation")
        )
    return train, validation
