"""Conversations for SFT: reading and validation, tokenization with the chat template, and loss weights per token.

A conversation is a row {"messages": [{"role", "content", "weight"?}, …], "tools"?: […]}, or one of another shape
(conversation_shapes.py), of JSONL or a table (rows.py).
The loss covers the assistant's turns only: what the template renders of them and the end-of-turn token, times the
message's `weight` (default 1; 0 masks the turn).

Sequence packing is in `sft_packing.py`, rendering in `chat_template.py`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_q3n.config import UserError
from megatron_q3n.data.chat_template import ChatTemplate
from megatron_q3n.data.conversation_shapes import messages_of, rename
from megatron_q3n.data.protected_text import TextSegment
from megatron_q3n.data.rows import read_rows

ROLES = ("system", "user", "assistant", "tool", "developer")
# what an assistant's turn may hold beside its content, under the names that datasets use
SPOKEN = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")
# characters of an invalid line that an error message quotes
SHOWN = 160


@dataclass(frozen=True)
class Conversation:
    """Messages of one conversation, and its location (file:line) for error messages."""

    messages: list[dict[str, Any]]
    location: str
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class TokenizedConversation:
    """Token ids, and the loss weight of each as a label. Shapes: (tokens,) int64 and float32."""

    tokens: np.ndarray
    weights: np.ndarray


def read_conversations(path: str | Path, columns: dict[str, str] | None = None) -> Iterator[Conversation]:
    """Yield the conversations of a file, folder or glob pattern (rows.py), with its columns under our names.

    Raises: UserError for a path that cannot be read, or an invalid conversation.
    """
    for row in read_rows(path):
        yield parse_conversation(rename(row.values, columns or {}, row.location), row.location)


def parse_conversation(row: Any, location: str) -> Conversation:
    """Validate one conversation.

    Raises: UserError naming its location and the problem.
    """
    messages = messages_of(row, location)
    cleaned = check_messages(messages, location)
    if all(message["role"] != "assistant" for message in cleaned):
        raise UserError(f"{location}: no message of role assistant, so it has no tokens with a loss; leave it out.")
    return Conversation(cleaned, location, check_tools(row.get("tools"), location))


def check_messages(messages: list[Any], location: str) -> list[dict[str, Any]]:
    """Return the messages without keys that hold null.

    Each must be an object with a role and a content or tool calls.

    Raises: UserError naming the location and the problem.
    """
    cleaned = _without_nulls(messages)
    if not all(isinstance(message, dict) for message in cleaned):
        raise UserError(f"{location}: a message is no JSON object: {str(messages)[:SHOWN]}.")
    for message in cleaned:
        _check_message(message, location)
    return cleaned


def check_tools(tools: Any, location: str) -> list[dict[str, Any]] | None:
    """Return a list of tool descriptions, given as a list or as its JSON text; None for no tools.

    Raises: UserError naming the location and the problem.
    """
    found = tools
    if isinstance(tools, str) and tools:
        try:
            found = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{location}: tools is text, but not JSON ({error}): {tools[:SHOWN]}.") from None
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise UserError(f"{location}: tools must be a list of objects, found {str(tools)[:SHOWN]}.")
    return _without_nulls(found)


def _without_nulls(value: Any) -> Any:
    """Return a JSON value without the keys that hold null, at every depth.

    A row of a table has every column and field of the table, with null where a message or a tool has no such key.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def apply_chat_template(
    conversation: Conversation, template: ChatTemplate, turns: str = "all"
) -> TokenizedConversation:
    """Render and tokenize a conversation; `turns`, "all" or "last", selects the assistant turns with a loss.

    Raises: UserError if the template refuses the conversation, or renders a turn differently when more turns follow.
    """
    messages, tools = conversation.messages, conversation.tools
    try:
        check_tools_are_rendered(template, messages, tools)
        segments = template.render(messages, tools=tools)
        text = _text(segments)
        spans = [_turn_span(conversation, template, text, index) for index in _turns_with_loss(messages, turns)]
    except UserError as error:
        raise UserError(f"{conversation.location}: {error}") from None
    tokens: list[int] = []
    weights: list[float] = []
    offset = 0
    for start, end, weight in [*spans, (len(text), len(text), 0.0)]:
        for begin, stop, value in ((offset, start, 0.0), (start, end, weight)):
            ids = template.encode(_slice(segments, begin, stop))
            tokens += ids
            weights += [value] * len(ids)
        offset = end
    return TokenizedConversation(np.array(tokens, np.int64), np.array(weights, np.float32))


def check_tools_are_rendered(
    template: ChatTemplate, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    """Raise UserError if there are tools and the template leaves them out."""
    if tools and template.ignores(messages, messages, tools=tools, reduced_tools=None):
        raise UserError(
            "the chat template leaves out tools; use a template that renders them (sft.chat_template), or remove them."
        )


def without_oldest_exchange(conversation: Conversation) -> Conversation | None:
    """Return the conversation without the messages before the second user message, system messages excepted.

    Returns: None if it has one exchange only.
    """
    messages = conversation.messages
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2 or all(m["role"] != "assistant" for m in messages[users[1] :]):
        return None
    system = [m for m in messages[: users[0]] if m["role"] in ("system", "developer")]
    return Conversation([*system, *messages[users[1] :]], conversation.location, conversation.tools)


def plain_texts(conversation: Conversation) -> list[str]:
    """Return a conversation's texts in the format of the plain template, for training a tokenizer."""
    return [f"{m['role']}:\n{m.get('content') or ''}\n" for m in conversation.messages]


def _turns_with_loss(messages: list[dict[str, Any]], turns: str) -> list[int]:
    indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return indices[-1:] if turns == "last" else indices


def _turn_span(conversation: Conversation, template: ChatTemplate, text: str, index: int) -> tuple[int, int, float]:
    """Return the start and end of an assistant's turn in the rendered text, and its loss weight."""
    messages, tools = conversation.messages, conversation.tools
    _check_turn_is_rendered(template, messages[: index + 1], tools)
    before = _text(template.render(messages[:index], generation_prompt=True, tools=tools))
    after = _text(template.render(messages[: index + 1], tools=tools))
    if not (text.startswith(after) and after.startswith(before)):
        raise UserError(
            f"the chat template renders turn {index + 1} differently when more turns follow, or differently from its "
            "generation prompt; train on the last turn only (sft.turns=last), or use another template "
            "(sft.chat_template)."
        )
    end = len(before) + template.end_of_last_special(after[len(before) :])
    return len(before), end, float(messages[index].get("weight", 1))


def _check_turn_is_rendered(
    template: ChatTemplate, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    """Raise UserError if the template leaves out part of the last message, and so trains its end too early."""
    *earlier, turn = messages
    for name in SPOKEN:
        rest = {key: value for key, value in turn.items() if key != name}
        if turn.get(name) and template.ignores(messages, [*earlier, rest], tools=tools):
            raise UserError(
                f"the chat template leaves out {name} of turn {len(messages)}, so that the model would learn to stop "
                "without it; use a template that renders it (sft.chat_template), or remove it from the message."
            )


def _text(segments: list[TextSegment]) -> str:
    return "".join(segment.text for segment in segments)


def _slice(segments: list[TextSegment], start: int, end: int) -> list[TextSegment]:
    """Return the segments of the characters from `start` to `end`."""
    parts, offset = [], 0
    for segment in segments:
        part = segment.text[max(0, start - offset) : max(0, end - offset)]
        offset += len(segment.text)
        if part:
            parts.append(TextSegment(part, segment.is_content))
    return parts


def _check_message(message: dict[str, Any], location: str) -> None:
    role, weight = message.get("role"), message.get("weight", 1)
    if role not in ROLES:
        raise UserError(f"{location}: role {role!r}; it must be one of {', '.join(ROLES)}.")
    if not isinstance(message.get("content", ""), str):
        raise UserError(f"{location}: the content of a message must be a string.")
    for call in message.get("tool_calls", []) if isinstance(message.get("tool_calls", []), list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                f'{location}: tool_calls must be a list of {{"function": {{"name": …, "arguments": …}}}}, found '
                f"{str(message['tool_calls'])[:SHOWN]}."
            )
    if not message.get("content") and not message.get("tool_calls"):
        raise UserError(f"{location}: a message of {role!r} has neither content nor tool_calls; leave it out.")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < 1e6:
        raise UserError(f"{location}: weight {weight!r}; it must be a number from 0.")
