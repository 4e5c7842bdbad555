"""Chat prompt: token ids of a conversation by the model's template, and the parser of the turn that answers it.

What the template does not render is refused: it would be ignored without a trace.
"""

import json
import re
from typing import Any

from megatron_q3n.data.chat_template import ChatTemplate
from megatron_q3n.server.chat_output import CALL, END_THINK, THINK, ChatOutput
from megatron_q3n.server.requests import BadRequest, ChatRequest, Message

# variables of a template that requests cannot set
_RESERVED = {"messages", "tools", "documents", "chat_template", "generation_prompt", "add_generation_prompt"}
_RESERVED |= {"eod_token", "eos_token", "bos_token", "self"}
# fields of a message that a template must render to be accepted
_OPTIONAL_FIELDS = ("reasoning_content", "tool_calls", "tool_call_id")


class ChatPrompt:
    """A tokenized conversation; `new_output` makes the parser of one answer."""

    def __init__(self, request: ChatRequest, template: ChatTemplate) -> None:
        """Raises: BadRequest for what the template does not render or refuses."""
        source = template.source
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or []]
        if tools and not ("tools" in source and CALL in source):
            raise BadRequest("this model's chat template has no tools", parameter="tools")
        # tool_choice=none: the tools are not shown to the model
        tools = [] if request.tool_choice == "none" else tools
        extras: dict[str, Any] = {"tools": tools} if tools else {}
        extras |= _template_variables(request, source)
        messages = [_message(message, source) for message in request.messages]
        try:
            segments = template.render(messages, generation_prompt=True, **extras)
        # errors of the template's expressions on these messages; UserError is a ValueError
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise BadRequest(f"messages: {error}", parameter="messages") from None
        self.tokens = template.encode(segments)
        markup = segments[-1].text if segments and not segments[-1].is_content else ""
        self._is_reasoning = markup.rstrip().endswith(THINK)
        self._has_reasoning = END_THINK in source
        self._tools = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}

    def new_output(self) -> ChatOutput:
        """Return a parser for one answer."""
        return ChatOutput(is_reasoning=self._is_reasoning, has_reasoning=self._has_reasoning, tools=self._tools)


def _template_variables(request: ChatRequest, source: str) -> dict[str, Any]:
    variables = request.chat_template_kwargs or {}
    for name in variables:
        if name in _RESERVED or not name.isidentifier() or not re.search(rf"\b{name}\b", source):
            raise BadRequest(
                f"chat_template_kwargs: this model's chat template has no variable {name!r} that a request can set",
                parameter="chat_template_kwargs",
            )
    return dict(variables)


def _message(message: Message, source: str) -> dict[str, Any]:
    """Return a message as templates expect it: content as one text, arguments of tool calls as an object."""
    content = message.text
    if content is None and not message.tool_calls:
        raise BadRequest(f"messages: a {message.role} message has no content", parameter="messages")
    result: dict[str, Any] = {"role": message.role, "content": content or ""}
    for name in _OPTIONAL_FIELDS:
        # templates know the answer of a tool by its place after the call; the id is for the client
        if getattr(message, name) is not None and name not in source and name != "tool_call_id":
            raise BadRequest(f"messages: this model's chat template has no {name}", parameter="messages")
    if message.reasoning_content is not None:
        result["reasoning_content"] = message.reasoning_content
    if message.tool_calls is not None:
        result["tool_calls"] = [
            {"type": "function", "function": {"name": c.function.name, "arguments": _arguments(c.function.arguments)}}
            for c in message.tool_calls
        ]
    return result


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise BadRequest("messages: the arguments of a tool call must be a JSON object as text", parameter="messages")
    return arguments
