"""Chat output: the text of an assistant's turn split into reasoning, content and tool calls, as it is generated.

The markup is that of Qwen's templates: markers around the reasoning and around each tool call, which is a JSON object
{"name", "arguments"}, or a function's name with a marked value for each parameter. A call that cannot be parsed remains
content, so nothing that the model wrote is lost.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from megatron_q3n.inference.stop_texts import longest_partial_match

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass
class ChatDelta:
    """What a piece of text adds to a turn; each tool call is {"name": …, "arguments": JSON text}."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[dict[str, str]] = field(default_factory=list)


class ChatOutput:
    """Parser of one turn, piece by piece."""

    def __init__(self, *, is_reasoning: bool, has_reasoning: bool, tools: dict[str, dict[str, Any]]) -> None:
        """Begin in reasoning where the prompt ends with its start; recognize only what the request and template have.

        `tools` are the JSON schemas of the parameters by the tool's name.
        """
        self._tools = tools
        self._state = "reasoning" if is_reasoning else "content"
        self._begins = [*([THINK] if has_reasoning and not is_reasoning else []), *([CALL] if tools else [])]
        # whether the next character is the first one of its part, before which white space is markup
        self._is_start = is_reasoning
        self._held = ""
        self.num_tool_calls = 0

    def add(self, text: str, *, is_last: bool = False) -> ChatDelta:
        """Return what this text adds; `is_last` releases what was held back as the possible beginning of markup."""
        delta = ChatDelta()
        self._held += text
        while self._take(delta):
            pass
        if is_last:
            rest = CALL + self._held if self._state == "call" else self._held
            self._emit(delta, rest, "content" if self._state == "call" else self._state)
            self._held = ""
        return delta

    def _take(self, delta: ChatDelta) -> bool:
        """Move text from the buffer into the delta. Returns: whether a marker was passed, so that more may follow."""
        # a turn reasons once, at its beginning
        if THINK in self._begins and not THINK.startswith(self._held.lstrip()[: len(THINK)]):
            self._begins.remove(THINK)
        markers = {"reasoning": [END_THINK], "call": [END_CALL], "content": self._begins}[self._state]
        found = [(index, marker) for marker in markers if (index := self._held.find(marker)) >= 0]
        if found:
            index, marker = min(found)
            before, self._held = self._held[:index], self._held[index + len(marker) :]
            self._pass_marker(delta, before, marker)
            return True
        if self._state != "call":
            split = len(self._held) - longest_partial_match(self._held, markers)
            # white space before a marker belongs to the markup
            split = len(self._held[:split].rstrip()) if markers else split
            self._emit(delta, self._held[:split], self._state)
            self._held = self._held[split:]
        return False

    def _pass_marker(self, delta: ChatDelta, before: str, marker: str) -> None:
        if marker == END_CALL:
            call = _parse_call(before, self._tools)
            if call is None:
                self._emit(delta, CALL + before + END_CALL, "content")
            else:
                delta.tool_calls.append(call)
                self.num_tool_calls += 1
                self._is_start = True
        else:
            self._emit(delta, before.rstrip(), self._state)
            self._is_start = True
        self._state = {THINK: "reasoning", CALL: "call"}.get(marker, "content")
        self._begins = [begin for begin in self._begins if begin != THINK]

    def _emit(self, delta: ChatDelta, text: str, state: str) -> None:
        text = text.lstrip() if self._is_start else text
        if not text:
            return
        self._is_start = False
        if state == "reasoning":
            delta.reasoning += text
        else:
            delta.content += text


def _parse_call(text: str, tools: dict[str, dict[str, Any]]) -> dict[str, str] | None:
    """Return the tool call of a block, or None if it has neither form."""
    if match := _FUNCTION.fullmatch(text):
        properties = tools.get(match[1], {}).get("properties", {})
        arguments = {key: _parameter(value, properties.get(key)) for key, value in _PARAMETER.findall(match[2])}
        return {"name": match[1], "arguments": json.dumps(arguments, ensure_ascii=False)}
    call = _json_or_text(text)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    given = call.get("arguments", {})
    return {
        "name": call["name"],
        "arguments": given if isinstance(given, str) else json.dumps(given, ensure_ascii=False),
    }


def _parameter(text: str, schema: Any) -> Any:
    """Return the value of a parameter: text where its schema says so, else JSON where it is."""
    is_text = isinstance(schema, dict) and schema.get("type") == "string"
    return text if is_text else _json_or_text(text)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
