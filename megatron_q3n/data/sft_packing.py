"""Sequence packing of conversations for SFT: best-fit-decreasing bins, document boundaries, a cache of token ids.

No conversation attends to another, and none is truncated but by the rule of `sft.too_long`. Conversations are packed
once; every epoch is a permutation of the packed sequences. So the sequences of a step are a function of the step, as in
pretraining. Tokenized conversations are cached under a hash of everything they depend on.

Position p of a sequence predicts the next token, so a conversation of n tokens takes n - 1 positions.
"""

import bisect
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_q3n.config import UserError
from megatron_q3n.config.sft import ConversationSource, SftConfig
from megatron_q3n.data.batch import Batch
from megatron_q3n.data.chat_template import ChatTemplate
from megatron_q3n.data.conversation_tasks import hash_fraction, task_conversations
from megatron_q3n.data.conversations import (
    Conversation,
    TokenizedConversation,
    apply_chat_template,
    read_conversations,
    without_oldest_exchange,
)
from megatron_q3n.data.sources import find_row_sources
from megatron_q3n.packing import Packing

# version of the cached files, part of their key: raise it when their layout changes
CACHE_VERSION = 2


@dataclass
class TokenizedConversations:
    """Tokenized conversations, concatenated; `counts` holds the number of conversations by outcome.

    Shapes: tokens, weights (all tokens,); bounds (conversations + 1,).
    """

    tokens: np.ndarray
    weights: np.ndarray
    bounds: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> TokenizedConversation:
        span = slice(self.bounds[index], self.bounds[index + 1])
        return TokenizedConversation(self.tokens[span], self.weights[span])

    @classmethod
    def of(cls, items: list[TokenizedConversation], counts: dict[str, int]) -> "TokenizedConversations":
        """Concatenate conversations."""
        empty = TokenizedConversation(np.empty(0, np.int64), np.empty(0, np.float32))
        return cls(
            np.concatenate([x.tokens for x in [empty, *items]]).astype(np.int32),
            np.concatenate([x.weights for x in [empty, *items]]),
            np.cumsum([0, *(len(x.tokens) for x in items)]),
            counts,
        )


class PackedConversations:
    """Packed sequences of a set of conversations, repeated without end, each epoch in its own order."""

    def __init__(self, conversations: TokenizedConversations, length: int, alignment: int, seed: int, eod: int) -> None:
        sizes = [_aligned_length(n, alignment) for n in np.diff(conversations.bounds).tolist()]
        self.bins = best_fit_decreasing(sizes, length)
        self._conversations, self._length, self._alignment = conversations, length, alignment
        self._seed, self._eod = seed, eod
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Return the number of sequences of one epoch."""
        return len(self.bins)

    def batch(self, index: int) -> Batch:
        """Return sequence `index` of the endless run of epochs as a micro-batch."""
        epoch, offset = divmod(index, len(self.bins))
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng((self._seed, epoch))
            self._order = (epoch, generator.permutation(len(self.bins)))
        members = self.bins[int(self._order[1][offset])]
        return pack([self._conversations[i] for i in members], self._length, self._alignment, self._eod)


def best_fit_decreasing(sizes: list[int], capacity: int) -> list[list[int]]:
    """Assign items to bins by best-fit decreasing bin packing; returns the indices of the items in each bin."""
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    # (remaining capacity, bin), ascending
    remaining: list[tuple[int, int]] = []
    bins: list[list[int]] = []
    for index in order:
        assert 0 < sizes[index] <= capacity, (sizes[index], capacity)
        position = bisect.bisect_left(remaining, (sizes[index], 0))
        if position < len(remaining):
            left, chosen = remaining.pop(position)
        else:
            left, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if left > sizes[index]:
            bisect.insort(remaining, (left - sizes[index], chosen))
    return bins


def pack(items: list[TokenizedConversation], length: int, alignment: int, eod: int) -> Batch:
    """Return one packed sequence of conversations; the rest is padding without loss.

    Shapes: (1, length) each; the packing has one document per conversation, and one for the padding.
    """
    tokens, labels = (np.full(length, eod, np.int64) for _ in range(2))
    weights, positions = np.zeros(length, np.float32), np.zeros(length, np.int64)
    bounds, used_lengths = [0], []
    for item in items:
        start, used = bounds[-1], len(item.tokens) - 1
        tokens[start : start + used] = item.tokens[:-1]
        labels[start : start + used] = item.tokens[1:]
        weights[start : start + used] = item.weights[1:]
        bounds.append(start + _aligned_length(used + 1, alignment))
        used_lengths.append(used)
    if bounds[-1] < length:
        bounds.append(length)
        used_lengths.append(0)
    for start, end in itertools.pairwise(bounds):
        positions[start:end] = np.arange(end - start)
    columns = (tokens, labels, weights, positions)
    tokens_BT, labels_BT, weights_BT, positions_BT = (torch.from_numpy(x)[None] for x in columns)
    return Batch(tokens_BT, labels_BT, weights_BT, positions_BT, packing=Packing.of(bounds, used_lengths=used_lengths))


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


def _tokenize_all(
    settings: SftConfig, template: ChatTemplate, length: int
) -> tuple[TokenizedConversations, TokenizedConversations]:
    train, validation = list(read_sources(settings.train)), list(read_sources(settings.validation))
    if not settings.validation:
        border = settings.validation_percent / 100
        is_held_out = [hash_fraction(json.dumps(c.messages, sort_keys=True)) < border for c in train]
        validation = [c for c, held_out in zip(train, is_held_out) if held_out]
        train = [c for c, held_out in zip(train, is_held_out) if not held_out]
    sets = [_tokenize(conversations, settings, template, length) for conversations in (train, validation)]
    for name, conversations in zip(("train", "validation"), sets):
        if not len(conversations):
            raise UserError(
                f"sft.{name}: no conversation is left ({conversations.counts}); give more, raise "
                f"training.sequence_length={length}, or choose another rule with sft.too_long."
            )
    return sets[0], sets[1]


def _tokenize(
    conversations: Iterable[Conversation], settings: SftConfig, template: ChatTemplate, length: int
) -> TokenizedConversations:
    counts: Counter[str] = Counter()
    items = []
    for conversation in conversations:
        counts["read"] += 1
        item, outcome = _fit(conversation, settings, template, length + 1)
        counts[outcome] += 1
        if item is not None:
            items.append(item)
    return TokenizedConversations.of(items, dict(counts))


def _fit(
    conversation: Conversation, settings: SftConfig, template: ChatTemplate, max_tokens: int
) -> tuple[TokenizedConversation | None, str]:
    """Tokenize a conversation into at most `max_tokens` by the rule of `sft.too_long`; also return the outcome."""
    item, outcome = apply_chat_template(conversation, template, settings.turns), "whole"
    if len(item.tokens) > max_tokens and settings.too_long == "drop":
        return None, "dropped as too long"
    if len(item.tokens) > max_tokens and settings.too_long == "cut":
        item, outcome = TokenizedConversation(item.tokens[:max_tokens], item.weights[:max_tokens]), "cut at the end"
    shorter: Conversation | None = conversation
    while len(item.tokens) > max_tokens:
        shorter, outcome = without_oldest_exchange(shorter) if shorter else None, "shortened by its oldest turns"
        if shorter is None:
            return None, "dropped as too long"
        item = apply_chat_template(shorter, template, settings.turns)
    if not item.weights[1:].any():
        return None, "dropped as without loss tokens"
    return item, outcome


def read_sources(sources: list[ConversationSource]) -> Iterator[Conversation]:
    """Yield the conversations of every source, in order."""
    for source in sources:
        if source.task is not None:
            yield from task_conversations(source.task)
        else:
            assert source.path is not None, "checked by the configuration"
            yield from read_conversations(source.path)


def _aligned_length(num_tokens: int, alignment: int) -> int:
    """Return the positions of a conversation of `num_tokens`, rounded up to a multiple of the alignment."""
    return -(-(num_tokens - 1) // alignment) * alignment


def _cache_key(settings: SftConfig, template: ChatTemplate, length: int, fingerprint: str) -> str:
    files = {
        source.path: [_digest(file.path) for file in find_row_sources(source.path)]
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


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the digests of every file in a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}. Check the path and permissions.") from None
    return digest.hexdigest()


def _write(file: Path, train: TokenizedConversations, validation: TokenizedConversations) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.stem}.{os.getpid()}.npz")
    arrays = {
        f"{name}_{array}": getattr(conversations, array)
        for name, conversations in (("train", train), ("validation", validation))
        for array in ("tokens", "weights", "bounds")
    }
    counts = np.array(json.dumps([train.counts, validation.counts]))
    np.savez(partial, allow_pickle=False, counts=counts, **arrays)
    os.replace(partial, file)


def _read(file: Path) -> tuple[TokenizedConversations, TokenizedConversations]:
    with np.load(file, allow_pickle=False) as stored:
        counts = json.loads(str(stored["counts"]))
        train, validation = (
            TokenizedConversations(stored[f"{name}_tokens"], stored[f"{name}_weights"], stored[f"{name}_bounds"], count)
            for name, count in zip(("train", "validation"), counts)
        )
    return train, validation
