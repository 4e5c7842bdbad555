"""Replies of the completions and chat API, whole and in chunks, in OpenAI's form."""

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.server.chat_output import ChatDelta
from megatron_q3n.server.choices import TokenLogprob

# vLLM's prefix of a token given by its id
TOKEN_ID_PREFIX = "token_id:"


@dataclass
class ReplyFormat:
    """Fields that all parts of a reply have in common."""

    kind: str
    model: str
    weight_version: int
    tokenizer: TextTokenizer
    gives_token_ids: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: list[dict[str, Any]], *, usage: dict[str, int] | None, is_chunk: bool) -> dict[str, Any]:
        """Return a reply, or with `is_chunk` a part of one."""
        is_chat = self.kind == "chat.completion"
        return {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{self.id}",
            "object": f"{self.kind}.chunk" if is_chunk and is_chat else self.kind,
            "created": self.created,
            "model": self.model,
            # changes with the weights
            "system_fingerprint": f"weights-{self.weight_version}",
            "choices": choices,
            **({} if usage is None else {"usage": usage}),
        }

    def completion_logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        """Return the log-probs of a completion."""
        return {
            "tokens": [self._name(entry.token) for entry in tokens],
            "token_logprobs": [entry.logprob for entry in tokens],
            "top_logprobs": [{self._name(t): p for t, p in entry.top.items()} for entry in tokens],
            "text_offset": [entry.text_offset for entry in tokens],
        }

    def chat_logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        """Return the log-probs of a chat's turn."""
        return {
            "content": [
                {
                    **self._chat_token(entry.token, entry.logprob),
                    "top_logprobs": [self._chat_token(token, logprob) for token, logprob in entry.top.items()],
                }
                for entry in tokens
            ]
        }

    def _chat_token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._name(token), "logprob": logprob, "bytes": list(self.tokenizer.token_bytes(token))}

    def _name(self, token: int) -> str:
        """Return the text of a token; OpenAI's form for bytes that are not whole characters, bytes:\\xe4\\xbd."""
        if self.gives_token_ids:
            return f"{TOKEN_ID_PREFIX}{token}"
        content = self.tokenizer.token_bytes(token)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def chat_fields(delta: ChatDelta, num_calls_before: int) -> dict[str, Any]:
    """Return the fields of a chunk's delta, without empty ones."""
    fields: dict[str, Any] = {}
    if delta.reasoning:
        fields["reasoning_content"] = delta.reasoning
    if delta.content:
        fields["content"] = delta.content
    if delta.tool_calls:
        fields["tool_calls"] = [
            {"index": num_calls_before + i, **tool_call(call)} for i, call in enumerate(delta.tool_calls)
        ]
    return fields


def tool_call(call: dict[str, str]) -> dict[str, Any]:
    """Return a tool call with an id of its own."""
    return {"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": call}


def usage(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, int]:
    """Return the numbers of tokens."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


def error_body(message: str, status: int, parameter: str | None = None) -> dict[str, Any]:
    """Return OpenAI's form of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": parameter, "code": status}}


def event(content: dict[str, Any] | str) -> str:
    """Return a server-sent event."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, allow_nan=False)
    return f"data: {text}\n\n"
