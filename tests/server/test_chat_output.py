"""A turn split into reasoning, content and tool calls: whole, and in pieces of any size, with the same result."""

from typing import Any

import pytest

from megatron_q3n.inference.stop_texts import StopTexts
from megatron_q3n.server.chat_output import ChatDelta, ChatOutput

SCHEMA = {"properties": {"zip": {"type": "string"}, "days": {"type": "integer"}}}
JSON_CALL = '<tool_call>\n{"name": "weather", "arguments": {"zip": "00184", "days": 2}}\n</tool_call>'
XML_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=zip>\n00184\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "</function>\n</tool_call>"
)
CALL = {"name": "weather", "arguments": '{"zip": "00184", "days": 2}'}
CASES: list[tuple[str, dict[str, Any], tuple[str, str, list[dict[str, str]]]]] = [
    ("hello <b>  ", {}, ("", "hello <b>  ", [])),
    ("  hello", {}, ("", "  hello", [])),
    ("<think>\na < b\n</think>\n\nyes", {}, ("a < b", "yes", [])),
    ("\nwhy\n</think>\n\nyes", {"is_reasoning": True}, ("why", "yes", [])),
    ("never ended", {"is_reasoning": True}, ("never ended", "", [])),
    ("a <think> inside", {}, ("", "a <think> inside", [])),
    ("<think>not known</think>", {"has_reasoning": False}, ("", "<think>not known</think>", [])),
    (f"I look.\n{JSON_CALL}\n{XML_CALL}", {}, ("", "I look.", [CALL, CALL])),
    (f"<think>x</think>\n{XML_CALL}", {}, ("x", "", [CALL])),
    (JSON_CALL, {"tools": {}}, ("", JSON_CALL, [])),
    ("<tool_call>{nonsense}</tool_call> b", {}, ("", "<tool_call>{nonsense}</tool_call> b", [])),
    ('<tool_call>{"name": "wea', {}, ("", '<tool_call>{"name": "wea', [])),
    ("a <tool", {}, ("", "a <tool", [])),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
@pytest.mark.parametrize(("text", "options", "wanted"), CASES)
def test_turns_in_pieces(text: str, options: dict[str, Any], wanted: Any, size: int) -> None:
    output = ChatOutput(**{"is_reasoning": False, "has_reasoning": True, "tools": {"weather": SCHEMA}, **options})
    total = ChatDelta()
    for begin in range(0, len(text), size):
        part = output.add(text[begin : begin + size], is_last=begin + size >= len(text))
        total.reasoning += part.reasoning
        total.content += part.content
        total.tool_calls += part.tool_calls
    assert (total.reasoning, total.content, total.tool_calls) == wanted
    assert output.num_tool_calls == len(wanted[2])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_stop_texts_in_pieces(size: int) -> None:
    for text, wanted in (("abcabd", "abc"), ("ab", "ab"), ("xxEND", "xx"), ("ENEND", "EN"), ("no stop a", "no stop a")):
        stops, shown = StopTexts(["abd", "END"]), ""
        for begin in range(0, len(text), size):
            shown += stops.add(text[begin : begin + size])
        assert shown + stops.flush() == wanted
        assert stops.is_stopped == (wanted != text)
