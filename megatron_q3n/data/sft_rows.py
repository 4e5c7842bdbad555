"""Conversations packed into rows: no conversation sees another, and none is cut but by the rule that is set.

Packing is best-fit decreasing, once; every pass over the data then takes the rows in another order. So
which rows a step trains on is a function of the step, as in pretraining. What is spelled is kept in the
cache, under a name that changes with everything it depends on.

Position p of a row predicts the token behind it, so a conversation of n tokens takes n - 1 places.
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
from megatron_q3n.data.conversation_tasks import conversations_of, place_of
from megatron_q3n.data.conversations import Conversation, Spelled, read_conversations, shortened, spell

LAYOUT = 1  # of the cached files; raise it when they change


@dataclass
class SpelledSet:
    """Spelled conversations end to end; `counts` says what became of those that were read.

    Shapes: tokens, weights (all tokens,); bounds (conversations + 1,).
    """

    tokens: np.ndarray
    weights: np.ndarray
    bounds: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Spelled:
        span = slice(self.bounds[index], self.bounds[index + 1])
        return Spelled(self.tokens[span], self.weights[span])

    @classmethod
    def of(cls, items: list[Spelled], counts: dict[str, int]) -> "SpelledSet":
        """Lay conversations end to end."""
        nothing = Spelled(np.empty(0, np.int64), np.empty(0, np.float32))
        return cls(
            np.concatenate([x.tokens for x in [nothing, *items]]).astype(np.int32),
            np.concatenate([x.weights for x in [nothing, *items]]),
            np.cumsum([0, *(len(x.tokens) for x in items)]),
            counts,
        )


class SftRows:
    """Packed rows of a set; `batch(i)` is row i of an endless run of passes."""

    def __init__(self, spelled: SpelledSet, length: int, alignment: int, seed: int, eod: int) -> None:
        places = [_places(n, alignment) for n in np.diff(spelled.bounds).tolist()]
        self.bins = pack(places, length)
        self._spelled, self._length, self._alignment = spelled, length, alignment
        self._seed, self._eod = seed, eod
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Rows of one pass."""
        return len(self.bins)

    def batch(self, number: int) -> Batch:
        """Return a row as a micro-batch."""
        one_pass, place = divmod(number, len(self.bins))
        if self._order is None or self._order[0] != one_pass:
            generator = np.random.default_rng((self._seed, one_pass))
            self._order = (one_pass, generator.permutation(len(self.bins)))
        chosen = self.bins[int(self._order[1][place])]
        return lay_out([self._spelled[i] for i in chosen], self._length, self._alignment, self._eod)


def pack(sizes: list[int], capacity: int) -> list[list[int]]:
    """Share items out over as few bins as best-fit decreasing finds; returns the indices in each bin."""
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    room: list[tuple[int, int]] = []  # (places left, bin), ascending
    bins: list[list[int]] = []
    for index in order:
        assert 0 < sizes[index] <= capacity, (sizes[index], capacity)
        place = bisect.bisect_left(room, (sizes[index], 0))
        if place < len(room):
            left, chosen = room.pop(place)
        else:
            left, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if left > sizes[index]:
            bisect.insort(room, (left - sizes[index], chosen))
    return bins


def lay_out(items: list[Spelled], length: int, alignment: int, eod: int) -> Batch:
    """Make one packed row; places that are left are padding, which nothing is learnt from."""
    tokens, labels = (np.full(length, eod, np.int64) for _ in range(2))
    weights, positions = np.zeros(length, np.float32), np.zeros(length, np.int64)
    bounds = [0]
    for item in items:
        start, used = bounds[-1], len(item.tokens) - 1
        tokens[start : start + used] = item.tokens[:-1]
        labels[start : start + used] = item.tokens[1:]
        weights[start : start + used] = item.weights[1:]
        bounds.append(start + _places(used + 1, alignment))
    if bounds[-1] < length:
        bounds.append(length)
    for start, end in itertools.pairwise(bounds):
        positions[start:end] = np.arange(end - start)
    columns = (tokens, labels, weights, positions)
    tokens_BT, labels_BT, weights_BT, positions_BT = (torch.from_numpy(x)[None] for x in columns)
    return Batch(
        tokens_BT,
        labels_BT,
        weights_BT,
        positions_BT,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=int(np.diff(bounds).max()),
    )


def spelled_sets(
    settings: SftConfig, template: ChatTemplate, length: int, cache: Path, fingerprint: str
) -> tuple[SpelledSet, SpelledSet]:
    """Return training and validation conversations, from the cache if they are there.

    Raises: UserError for bad conversations, or if a rule leaves none.
    """
    key = _key(settings, template, length, fingerprint)
    file = cache / "conversations" / f"{key}.npz"
    if not file.is_file():
        train, validation = _spell_all(settings, template, length)
        _write(file, train, validation)
    return _read(file)


def _spell_all(settings: SftConfig, template: ChatTemplate, length: int) -> tuple[SpelledSet, SpelledSet]:
    train, validation = list(read_all(settings.train)), list(read_all(settings.validation))
    if not settings.validation:
        border = settings.validation_percent / 100
        held_out = [place_of(json.dumps(c.messages, sort_keys=True)) < border for c in train]
        validation = [c for c, out in zip(train, held_out) if out]
        train = [c for c, out in zip(train, held_out) if not out]
    sets = [_spell_set(part, settings, template, length) for part in (train, validation)]
    for name, part in zip(("train", "validation"), sets):
        if not len(part):
            raise UserError(
                f"sft.{name}: no conversation is left ({part.counts}); give more, raise training.sequence_length="
                f"{length}, or choose another rule with sft.too_long."
            )
    return sets[0], sets[1]


def _spell_set(
    conversations: Iterable[Conversation], settings: SftConfig, template: ChatTemplate, length: int
) -> SpelledSet:
    counts: Counter[str] = Counter()
    items = []
    for conversation in conversations:
        counts["read"] += 1
        item, fate = _fitted(conversation, settings, template, length + 1)
        counts[fate] += 1
        if item is not None:
            items.append(item)
    return SpelledSet.of(items, dict(counts))


def _fitted(
    conversation: Conversation, settings: SftConfig, template: ChatTemplate, most: int
) -> tuple[Spelled | None, str]:
    """Spell a conversation in at most so many tokens, by the rule; say which way it went."""
    item, fate = spell(conversation, template, settings.turns), "whole"
    if len(item.tokens) > most and settings.too_long == "drop":
        return None, "dropped as too long"
    if len(item.tokens) > most and settings.too_long == "cut":
        item, fate = Spelled(item.tokens[:most], item.weights[:most]), "cut at the end"
    left: Conversation | None = conversation
    while len(item.tokens) > most:
        left, fate = shortened(left) if left else None, "shortened by its oldest turns"
        if left is None:
            return None, "dropped as too long"
        item = spell(left, template, settings.turns)
    if not item.weights[1:].any():
        return None, "dropped as nothing in it counts"
    return item, fate


def read_all(sources: list[ConversationSource]) -> Iterator[Conversation]:
    """Yield the conversations of every source, in order."""
    for source in sources:
        if source.task is not None:
            yield from conversations_of(source.task)
        else:
            assert source.path is not None, "the configuration sees to it"
            yield from read_conversations(source.path)


def _places(num_tokens: int, alignment: int) -> int:
    return -(-(num_tokens - 1) // alignment) * alignment


def _key(settings: SftConfig, template: ChatTemplate, length: int, fingerprint: str) -> str:
    files = {
        source.path: _digest(Path(source.path).expanduser())
        for source in [*settings.train, *settings.validation]
        if source.path is not None
    }
    facts: dict[str, Any] = {
        "layout": LAYOUT,
        "settings": settings.model_dump(mode="json"),
        "files": files,
        "template": template.source,
        "length": length,
        "tokenizer": fingerprint,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _digest(path: Path) -> str:
    """Return a digest of a file, or of every file in a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise UserError(
                f"conversations {file}: {error.strerror}. Give a .jsonl file or a folder saved by datasets."
            ) from None
    return digest.hexdigest()


def _write(file: Path, train: SpelledSet, validation: SpelledSet) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.stem}.{os.getpid()}.npz")
    arrays = {
        f"{name}_{part}": getattr(spelled, part)
        for name, spelled in (("train", train), ("validation", validation))
        for part in ("tokens", "weights", "bounds")
    }
    counts = np.array(json.dumps([train.counts, validation.counts]))
    np.savez(partial, allow_pickle=False, counts=counts, **arrays)
    os.replace(partial, file)


def _read(file: Path) -> tuple[SpelledSet, SpelledSet]:
    with np.load(file, allow_pickle=False) as stored:
        counts = json.loads(str(stored["counts"]))
        train, validation = (
            SpelledSet(stored[f"{name}_tokens"], stored[f"{name}_weights"], stored[f"{name}_bounds"], c)
            for name, c in zip(("train", "validation"), counts)
        )
    return train, validation
