"""Endpoints of generation: /v1/completions and /v1/chat/completions, each with a whole reply or a stream of chunks."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from megatron_q3n.config.serve import ServeConfig
from megatron_q3n.data.chat_template import ChatTemplate
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.server.chat_prompt import ChatPrompt
from megatron_q3n.server.choices import Delta, TokenLogprob
from megatron_q3n.server.generations import Generation, Generations
from megatron_q3n.server.replies import ReplyFormat, chat_fields, tool_call, usage
from megatron_q3n.server.requests import (
    DEFAULT_COMPLETION_TOKENS,
    BadRequest,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)


class Endpoint[R: GenerationRequest]:
    """One API: `prepare` checks a request; the result is replied whole or streamed."""

    kind: str
    request_type: type[R]

    def __init__(
        self,
        generations: Generations,
        tokenizer: TextTokenizer,
        template: ChatTemplate,
        settings: ServeConfig,
        weight_version: Callable[[], int],
    ) -> None:
        self._generations, self._tokenizer, self._template = generations, tokenizer, template
        self._model_name, self._weight_version = settings.model_name, weight_version

    def prepare(self, request: R) -> "PreparedReply":
        """Return the reply of a request, not started. Takes time for long prompts.

        Raises: BadRequest.
        """
        raise NotImplementedError

    def _check_model(self, request: R) -> None:
        if request.model not in (None, self._model_name):
            raise BadRequest(
                f"there is no model {request.model!r}; this server has {self._model_name!r}",
                status=404,
                parameter="model",
            )

    def _format(self, request: R) -> ReplyFormat:
        return ReplyFormat(
            self.kind,
            self._model_name,
            self._weight_version(),
            self._tokenizer,
            gives_token_ids=bool(request.return_tokens_as_token_ids),
        )


class PreparedReply:
    """A checked request and its reply; subclasses turn each choice's additions into JSON."""

    def __init__(
        self, generations: Generations, generation: Generation, request: GenerationRequest, form: ReplyFormat
    ) -> None:
        self._generations, self._generation, self._form = generations, generation, form
        self.is_streamed, self._includes_usage = bool(request.stream), request.includes_usage

    async def whole(self, mark_first: Callable[[], None]) -> dict[str, Any]:
        """Return the reply when every choice is finished."""
        deltas: list[list[Delta]] = [[] for _ in self._generation.choices]
        async with aclosing(self._generations.run(self._generation)) as steps:
            async for number, delta in steps:
                mark_first()
                deltas[number].append(delta)
        choices = []
        for number, parts in enumerate(deltas):
            tokens = [token for part in parts for token in part.tokens]
            joined = Delta("".join(part.text for part in parts), tokens, parts[-1].finish_reason)
            choices.append(self._choice(number, joined))
        return self._form.body(choices, usage=self._usage(), is_chunk=False)

    async def chunks(self, mark_first: Callable[[], None]) -> AsyncGenerator[dict[str, Any]]:
        """Yield the reply in chunks."""
        for choice in self._first_chunks():
            yield self._form.body([choice], usage=None, is_chunk=True)
        async with aclosing(self._generations.run(self._generation)) as steps:
            async for number, delta in steps:
                mark_first()
                addition = self._chunk(number, delta)
                if addition is not None:
                    yield self._form.body([addition], usage=None, is_chunk=True)
        if self._includes_usage:
            yield self._form.body([], usage=self._usage(), is_chunk=True)

    def _usage(self) -> dict[str, int]:
        return usage(self._generation.num_prompt_tokens, self._generation.num_generated_tokens)

    def _first_chunks(self) -> list[dict[str, Any]]:
        """Return the chunks before any token."""
        return []

    def _choice(self, number: int, delta: Delta) -> dict[str, Any]:
        """Return a finished choice; `delta` is all of it."""
        raise NotImplementedError

    def _chunk(self, number: int, delta: Delta) -> dict[str, Any] | None:
        """Return an addition to a choice, or None if there is nothing to show."""
        raise NotImplementedError


class CompletionReply(PreparedReply):
    """Reply of /v1/completions."""

    def __init__(
        self, generations: Generations, generation: Generation, request: CompletionRequest, form: ReplyFormat
    ) -> None:
        super().__init__(generations, generation, request, form)
        self._has_logprobs = request.logprobs is not None

    def _choice(self, number: int, delta: Delta) -> dict[str, Any]:
        logprobs = self._form.completion_logprobs(delta.tokens) if self._has_logprobs else None
        return {"index": number, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def _chunk(self, number: int, delta: Delta) -> dict[str, Any] | None:
        is_shown = delta.text or delta.finish_reason or self._has_logprobs
        return self._choice(number, delta) if is_shown else None


class ChatReply(PreparedReply):
    """Reply of /v1/chat/completions."""

    def __init__(
        self,
        generations: Generations,
        generation: Generation,
        request: ChatRequest,
        form: ReplyFormat,
        prompt: ChatPrompt,
    ) -> None:
        super().__init__(generations, generation, request, form)
        self._has_logprobs = bool(request.logprobs)
        self._outputs = [prompt.new_output() for _ in generation.choices]

    def _first_chunks(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "finish_reason": None} for i in range(len(self._outputs))]

    def _choice(self, number: int, delta: Delta) -> dict[str, Any]:
        parsed = self._outputs[number].add(delta.text, is_last=True)
        message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
        if parsed.reasoning:
            message["reasoning_content"] = parsed.reasoning
        if parsed.tool_calls:
            message |= {"content": parsed.content or None, "tool_calls": [tool_call(c) for c in parsed.tool_calls]}
        return {
            "index": number,
            "message": message,
            "logprobs": self._logprobs(delta.tokens),
            "finish_reason": self._finish_reason(number, delta),
        }

    def _chunk(self, number: int, delta: Delta) -> dict[str, Any] | None:
        num_calls_before = self._outputs[number].num_tool_calls
        parsed = self._outputs[number].add(delta.text, is_last=delta.finish_reason is not None)
        fields = chat_fields(parsed, num_calls_before)
        if not (fields or delta.finish_reason or self._has_logprobs):
            return None
        chunk = {"index": number, "delta": fields, "finish_reason": self._finish_reason(number, delta)}
        return chunk | ({"logprobs": self._logprobs(delta.tokens)} if self._has_logprobs else {})

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any] | None:
        return self._form.chat_logprobs(tokens) if self._has_logprobs else None

    def _finish_reason(self, number: int, delta: Delta) -> str | None:
        has_calls = self._outputs[number].num_tool_calls > 0
        return "tool_calls" if delta.finish_reason == "stop" and has_calls else delta.finish_reason


class CompletionEndpoint(Endpoint[CompletionRequest]):
    """/v1/completions."""

    kind, request_type = "text_completion", CompletionRequest

    def prepare(self, request: CompletionRequest) -> CompletionReply:
        """Return the reply of a request, not started. Raises: BadRequest."""
        self._check_model(request)
        prompts = request.prompts()
        self._generations.check_num_choices(len(prompts), request)
        tokens = [self._generations.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        max_tokens = request.max_tokens or DEFAULT_COMPLETION_TOKENS
        generation = self._generations.prepare(tokens, request, max_tokens, request.logprobs or 0)
        return CompletionReply(self._generations, generation, request, self._format(request))


class ChatEndpoint(Endpoint[ChatRequest]):
    """/v1/chat/completions."""

    kind, request_type = "chat.completion", ChatRequest

    def prepare(self, request: ChatRequest) -> ChatReply:
        """Return the reply of a request, not started. Raises: BadRequest."""
        self._check_model(request)
        self._generations.check_num_choices(1, request)
        self._generations.check_length(sum(len(message.text or "") for message in request.messages))
        prompt = ChatPrompt(request, self._template)
        max_tokens = request.max_completion_tokens or request.max_tokens
        if max_tokens is None:
            max_tokens = self._generations.max_new_tokens(prompt.tokens)
        generation = self._generations.prepare([prompt.tokens], request, max_tokens, request.top_logprobs or 0)
        return ChatReply(self._generations, generation, request, self._format(request), prompt)
