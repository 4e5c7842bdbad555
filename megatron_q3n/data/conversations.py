"""Conversations: read, spelled in the chat template, and which tokens a model is to learn from them.

A conversation is a JSON object {"messages": [{"role", "content", "weight"?}, …], "tools"?: […]}, one a
line, or a row of a Hugging Face datasets folder. Only what the assistant says counts: its content and
the token that ends its turn, weighed by the message's `weight` (1 unless given; 0 leaves it out).

Packing into rows is `sft_rows.py`; templates are `chat_template.py`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_q3n.config import UserError
from megatron_q3n.data.chat_template import ChatTemplate, Piece

ROLES = ("system", "user", "assistant", "tool", "developer")
SHOWN = 160  # characters of a bad line that an error repeats


@dataclass(frozen=True)
class Conversation:
    """Messages, and where they stand, for errors."""

    messages: list[dict[str, Any]]
    place: str
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Spelled:
    """Token ids, and how much each counts when it is predicted. Shapes: (tokens,) int64 and float32."""

    tokens: np.ndarray
    weights: np.ndarray


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """Yield the conversations of a .jsonl file or a folder saved by Hugging Face datasets.

    Raises: UserError for a path that holds neither, or a conversation that is none.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        yield from _rows_of_dataset(path)
        return
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield conversation_of(_parsed(line, f"{path}:{number}"), f"{path}:{number}")
    except OSError as error:
        raise UserError(
            f"conversations {path}: {error.strerror}. Give a .jsonl file or a folder saved by datasets."
        ) from None


def conversation_of(row: Any, place: str) -> Conversation:
    """Check one conversation.

    Raises: UserError naming its place and what is wrong.
    """
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f'{place}: no conversation; it must be {{"messages": [{{"role": …, "content": …}}, …]}}, '
            f"found {str(row)[:SHOWN]}."
        )
    # rows of a table hold every column, empty ones as None
    kept = [{k: v for k, v in m.items() if v is not None} for m in messages if isinstance(m, dict)]
    if len(kept) != len(messages):
        raise UserError(f"{place}: a message is no object: {str(messages)[:SHOWN]}.")
    for message in kept:
        _check_message(message, place)
    if all(message["role"] != "assistant" for message in kept):
        raise UserError(f"{place}: no assistant's turn, so there is nothing to learn from it.")
    return Conversation(kept, place, row.get("tools") or None)


def spell(conversation: Conversation, template: ChatTemplate, turns: str = "all") -> Spelled:
    """Spell a conversation; `turns` is "all" or "last".

    Raises: UserError if the template refuses it, or rewrites earlier turns in the light of later ones.
    """
    messages, tools = conversation.messages, conversation.tools
    try:
        whole = template.spell(messages, tools=tools)
        text = "".join(piece.text for piece in whole)
        spans = [_turn(conversation, template, text, place) for place in _counted(messages, turns)]
    except UserError as error:
        raise UserError(f"{conversation.place}: {error}") from None
    tokens: list[int] = []
    weights: list[float] = []
    done = 0
    for start, end, weight in [*spans, (len(text), len(text), 0.0)]:
        for begin, stop, value in ((done, start, 0.0), (start, end, weight)):
            ids = template.encode(_cut(whole, begin, stop))
            tokens += ids
            weights += [value] * len(ids)
        done = end
    return Spelled(np.array(tokens, np.int64), np.array(weights, np.float32))


def shortened(conversation: Conversation) -> Conversation | None:
    """Return the conversation without its oldest exchange: all up to the second user's message but the
    system's; None if there is only one.
    """
    messages = conversation.messages
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2 or all(m["role"] != "assistant" for m in messages[users[1] :]):
        return None
    head = [m for m in messages[: users[0]] if m["role"] in ("system", "developer")]
    return Conversation([*head, *messages[users[1] :]], conversation.place, conversation.tools)


def texts_of(conversation: Conversation) -> list[str]:
    """Return a conversation's texts as the plain template lays them out, for training a tokenizer."""
    return [f"{m['role']}:\n{m.get('content') or ''}\n" for m in conversation.messages]


def _counted(messages: list[dict[str, Any]], turns: str) -> list[int]:
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return places[-1:] if turns == "last" else places


def _turn(conversation: Conversation, template: ChatTemplate, text: str, place: int) -> tuple[int, int, float]:
    """Return where an assistant's turn begins and ends in the conversation's text, and its weight."""
    messages, tools = conversation.messages, conversation.tools
    before = _text(template.spell(messages[:place], generation_prompt=True, tools=tools))
    after = _text(template.spell(messages[: place + 1], tools=tools))
    if not (text.startswith(after) and after.startswith(before)):
        raise UserError(
            f"the chat template spells turn {place + 1} otherwise when more follows, or otherwise than its generation "
            "prompt begins; count only the last turn (sft.turns=last), or use another template "
            "(sft.chat_template)."
        )
    end = len(before) + template.behind_last_special(after[len(before) :])
    return len(before), end, float(messages[place].get("weight", 1))


def _text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _cut(pieces: list[Piece], start: int, end: int) -> list[Piece]:
    """Return the pieces of the characters from `start` to `end`."""
    cut, place = [], 0
    for piece in pieces:
        part = piece.text[max(0, start - place) : max(0, end - place)]
        place += len(piece.text)
        if part:
            cut.append(Piece(part, piece.is_content))
    return cut


def _check_message(message: dict[str, Any], place: str) -> None:
    role, weight = message.get("role"), message.get("weight", 1)
    if role not in ROLES:
        raise UserError(f"{place}: role {role!r}; there are {', '.join(ROLES)}.")
    if not isinstance(message.get("content", ""), str):
        raise UserError(f"{place}: the content of a message must be a text.")
    if not message.get("content") and not message.get("tool_calls"):
        raise UserError(f"{place}: a message of {role!r} says nothing; leave it out.")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < 1e6:
        raise UserError(f"{place}: weight {weight!r}; it must be a number from 0.")


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}): {line[:SHOWN].strip()}") from None


def _rows_of_dataset(folder: Path) -> Iterator[Conversation]:
    import datasets  # late: a second and a half that JSONL need not wait for

    try:
        table = datasets.load_from_disk(str(folder))
    except FileNotFoundError:
        raise UserError(
            f"conversations {folder}: not a folder saved by Hugging Face datasets (save_to_disk)."
        ) from None
    if isinstance(table, datasets.DatasetDict):
        raise UserError(f"conversations {folder}: holds several splits ({', '.join(table)}); name one: {folder}/SPLIT.")
    for number, row in enumerate(table):
        yield conversation_of(row, f"{folder}:{number + 1}")
