"""Shapes of rows that hold a conversation: {messages}, ShareGPT {conversations}, Alpaca {instruction, input, output}.

The shape follows from a row's columns, after those that the source names have been renamed (`columns`).
"""

import json
from typing import Any

from megatron_q3n.config import UserError, suggest

# roles of ShareGPT files -> ours; a function_call is an assistant's turn that only calls a tool
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
_SHAPES = (
    '{"messages": [{"role": …, "content": …}, …]}, {"conversations": [{"from": …, "value": …}, …]} or '
    '{"instruction": …, "input"?: …, "output": …}'
)
SHOWN_CHARACTERS = 160


def rename(values: dict[str, Any], columns: dict[str, str], location: str) -> dict[str, Any]:
    """Return a row with the columns of a file under our names, `columns` being {our name: the file's}.

    Raises: UserError for a column that the row does not have.
    """
    for theirs in columns.values():
        if theirs not in values:
            known = ", ".join(map(str, list(values)[:20])) or "none"
            raise UserError(f"{location}: no column {theirs!r}.{suggest(theirs, values)} Columns here: {known}.")
    others = {name: value for name, value in values.items() if name not in columns.values()}
    return others | {ours: values[theirs] for ours, theirs in columns.items()}


def messages_of(values: Any, location: str) -> list[Any]:
    """Return the messages of a row of any shape; those that are given as messages are not checked.

    Raises: UserError for a row of no shape.
    """
    row = values if isinstance(values, dict) else {}
    if isinstance(row.get("messages"), list) and row["messages"]:
        return row["messages"]
    if isinstance(row.get("conversations"), list) and row["conversations"]:
        return _with_system(row, [_from_sharegpt(turn, location) for turn in row["conversations"]], location)
    if isinstance(row.get("instruction"), str):
        return _from_alpaca(row, location)
    raise UserError(f"{location}: no conversation; it must be {_SHAPES}, found {str(values)[:SHOWN_CHARACTERS]}.")


def is_messages(values: dict[str, Any]) -> bool:
    """Return whether a row has the shape {messages}."""
    return isinstance(values.get("messages"), list) and bool(values["messages"])


def _from_sharegpt(turn: Any, location: str) -> Any:
    """Return a ShareGPT turn as a message; one with a role is one already."""
    if not isinstance(turn, dict) or "role" in turn:
        return turn
    sender, value = turn.get("from"), turn.get("value")
    role = _SHAREGPT_ROLES.get(str(sender))
    if role is None:
        raise UserError(f"{location}: a turn is from {sender!r}; it must be one of {', '.join(_SHAREGPT_ROLES)}.")
    weight = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
    if sender != "function_call":
        return {"role": role, "content": value, **weight}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{location}: a function_call is not JSON ({error}): {str(value)[:SHOWN_CHARACTERS]}."
        ) from None
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": role, "tool_calls": [{"type": "function", "function": call} for call in calls], **weight}


def _from_alpaca(row: dict[str, Any], location: str) -> list[dict[str, Any]]:
    texts = {name: row.get(name) for name in ("instruction", "input", "output")}
    for name, text in texts.items():
        if not isinstance(text, str | None):
            raise UserError(f"{location}: {name} is {type(text).__name__}, not text.")
    question = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    messages: list[dict[str, Any]] = []
    for pair in row.get("history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(f"{location}: history must hold pairs of a question and an answer, found {str(pair)[:80]}.")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages.append({"role": "user", "content": question})
    if texts["output"] is not None:
        messages.append({"role": "assistant", "content": texts["output"]})
    return _with_system(row, messages, location)


def _with_system(row: dict[str, Any], messages: list[Any], location: str) -> list[Any]:
    system = row.get("system")
    if not isinstance(system, str | None):
        raise UserError(f"{location}: system is {type(system).__name__}, not text.")
    return [{"role": "system", "content": system}, *messages] if system else messages
