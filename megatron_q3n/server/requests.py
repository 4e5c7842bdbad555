"""Requests of OpenAI's completions and chat API: their fields, and one clear message for what is wrong with a body.

A parameter that is not listed here is refused and never ignored. A parameter of OpenAI's API without support here is
accepted with the value that has no effect, which clients send as their default.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from megatron_q3n.config.errors import suggest
from megatron_q3n.config.sampling import temperature_complaint, top_p_complaint

# OpenAI's limits
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
DEFAULT_COMPLETION_TOKENS = 16
# values without effect of parameters that have no support
NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "echo": (None, False),
    "suffix": (None, ""),
    "response_format": (None, {"type": "text"}),
    "parallel_tool_calls": (None, True),
    "refusal": (None,),
    "audio": (None,),
    "function_call": (None,),
    "annotations": (None, []),
}


class BadRequest(ValueError):
    """An invalid request, with the HTTP status and the parameter it is about."""

    def __init__(self, message: str, *, status: int = 400, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status, self.parameter = status, parameter


class _Body(BaseModel):
    """A JSON object without unknown keys and without conversions between types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @field_validator(*NEUTRAL, check_fields=False)
    @classmethod
    def _has_no_effect(cls, value: Any, info: Any) -> Any:
        allowed = NEUTRAL[info.field_name]
        if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in allowed):
            raise ValueError(f"is not supported; leave it out (or {allowed[-1]!r})")
        return value


class StreamOptions(_Body):
    """`include_usage` adds a last chunk with the numbers of tokens."""

    include_usage: bool | None = None


class GenerationRequest(_Body):
    """Parameters of both APIs; the extensions top_k, stop_token_ids and return_tokens_as_token_ids are vLLM's."""

    model: str | None = None
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: bool | None = None
    user: str | None = None
    frequency_penalty: JsonValue = None
    presence_penalty: JsonValue = None
    logit_bias: JsonValue = None

    @field_validator("temperature")
    @classmethod
    def _temperature(cls, value: float | None) -> float | None:
        if value is not None and (complaint := temperature_complaint(value)):
            raise ValueError(complaint)
        return value

    @field_validator("top_p")
    @classmethod
    def _top_p(cls, value: float | None) -> float | None:
        if value is not None and (complaint := top_p_complaint(value)):
            raise ValueError(complaint)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "GenerationRequest":
        if len(self.stops) > MAX_STOPS or not all(self.stops):
            raise ValueError(f"stop must be one text or up to {MAX_STOPS}, none of them empty")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options has no effect without stream=true")
        return self

    @property
    def stops(self) -> list[str]:
        """Texts that end a completion and are not part of it."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def num_choices(self) -> int:
        """Completions of each prompt."""
        return self.n or 1

    @property
    def restricts_top_k(self) -> int | None:
        """Number of most probable tokens to sample from; vLLM's -1 and 0 are no restriction."""
        return self.top_k if self.top_k and self.top_k > 0 else None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    prompt: str | list[JsonValue]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = None
    echo: JsonValue = None
    suffix: JsonValue = None

    @model_validator(mode="after")
    def _best_of_is_n(self) -> "CompletionRequest":
        if self.best_of not in (None, self.num_choices):
            raise ValueError("best_of is not supported; leave it out (or set it to n)")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, as texts or token ids.

        Raises: BadRequest.
        """
        prompt = self.prompt
        items = [prompt] if isinstance(prompt, str) or (prompt and all(type(t) is int for t in prompt)) else prompt
        prompts = [item for item in items if isinstance(item, str) or _is_token_ids(item)]
        if not items or len(prompts) < len(items):
            raise BadRequest("prompt must be a text, token ids, or a list of either", parameter="prompt")
        return prompts  # type: ignore[return-value]


class FunctionCall(_Body):
    """Name and arguments (JSON text) of a tool call."""

    name: str
    arguments: str


class ToolCall(_Body):
    """A call of a tool by the assistant, in a message of the past."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: FunctionCall


class TextPart(_Body):
    """Part of a message's content; other kinds than text have no support."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: JsonValue = None
    annotations: JsonValue = None
    audio: JsonValue = None
    function_call: JsonValue = None

    @property
    def text(self) -> str | None:
        """The content as one text."""
        return "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content


class FunctionSchema(_Body):
    """Description of a tool's function; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: Literal[False] | None = None


class Tool(_Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionSchema


class ChatRequest(GenerationRequest):
    """Body of /v1/chat/completions; `chat_template_kwargs` are further variables of the template (vLLM's extension)."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    parallel_tool_calls: JsonValue = None
    response_format: JsonValue = None

    @model_validator(mode="after")
    def _consistent_chat(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs has no effect without logprobs=true")
        if self.tool_choice and not self.tools:
            raise ValueError("tool_choice has no effect without tools")
        return self


class WeightsRequest(_Body):
    """Body of /update_weights_from_disk."""

    model_path: str = Field(min_length=1)


def parse[T: BaseModel](kind: type[T], body: bytes) -> T:
    """Return a checked request.

    Raises: BadRequest with one message: which parameter, what is allowed.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
    names = [str(part) for part in problem["loc"] if isinstance(part, int) or str(part).isidentifier()]
    where = ".".join(names)
    if problem["type"] == "extra_forbidden":
        message = f"{where} is not a parameter of this API here.{suggest(where, kind.model_fields)}"
    else:
        reason = problem["msg"].removeprefix("Value error, ")
        message = f"{where}: {reason[0].lower()}{reason[1:]}." if where else f"{reason}."
    raise BadRequest(message, parameter=where or None)


def _is_token_ids(item: object) -> bool:
    return isinstance(item, list) and bool(item) and all(type(token) is int for token in item)
