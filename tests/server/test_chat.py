"""/v1/chat/completions with the official client: templates, tools in and out, reasoning, streams.

Two models: a random one, and one that knows one answer by heart, with reasoning and a tool call, so that what a model
says is compared with what a client receives.
"""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from megatron_q3n.data.chat_template import ChatTemplate
from tests.inference.tiny_model import tiny_model
from tests.server.tiny_server import KEY, VOCAB, chat_tokenizer, running

TEMPLATE = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- 'Answer with <tool_call>...</tool_call>.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if fast %}{{- '<think></think>' }}{%- endif %}
{%- endif %}"""
TOOL: Any = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}
QUESTION: Any = [{"role": "user", "content": "2?"}]
ANSWER = '<think>hm</think>\n\nok\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'


def learn(model: Any, prompt: list[int], answer: list[int]) -> None:
    """Train the model until its greedy answer is this one."""
    ids = torch.tensor([prompt + answer])
    positions = torch.arange(ids.shape[1] - 1)[None]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.mtp_process, mtp = False, model.mtp_process
    for _ in range(300):
        logits = model(ids[:, :-1], positions, None)[:, len(prompt) - 1 :].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :])
        if loss < 0.05:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.mtp_process = mtp
    assert loss < 0.05


@pytest.fixture(scope="module")
def taught(alone: Any) -> Iterator[openai.OpenAI]:
    """A client of a server whose model answers QUESTION with ANSWER."""
    tokenizer = chat_tokenizer()
    model = tiny_model(alone, vocab_size=VOCAB, max_position_embeddings=512)
    prompt = ChatTemplate(TEMPLATE, tokenizer).prompt(QUESTION, tools=[TOOL])
    learn(model, prompt, [*tokenizer.encode(ANSWER), tokenizer.special_ids["<|im_end|>"]])
    with (
        running(alone, template=TEMPLATE, model=model) as server,
        openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client,
    ):
        yield client


def chat(client: openai.OpenAI, **parameters: Any) -> Any:
    settings: dict[str, Any] = {"model": "policy", "messages": QUESTION, "temperature": 0, "max_completion_tokens": 200}
    return client.chat.completions.create(**settings | parameters)


def test_reasoning_content_and_tool_calls_come_apart(taught: openai.OpenAI) -> None:
    choice = chat(taught, tools=[TOOL]).choices[0]
    assert choice.message.reasoning_content == "hm"
    assert choice.message.content == "ok"
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "f", '{"x": 1}')
    assert call.id.startswith("call_")
    assert choice.finish_reason == "tool_calls"


def test_the_stream_says_the_same(taught: openai.OpenAI) -> None:
    chunks = [chunk.choices[0] for chunk in chat(taught, tools=[TOOL], stream=True, stream_options=None)]
    assert chunks[0].delta.role == "assistant"
    reasoning = "".join(getattr(chunk.delta, "reasoning_content", None) or "" for chunk in chunks)
    assert (reasoning, "".join(chunk.delta.content or "" for chunk in chunks)) == ("hm", "ok")
    (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert (call.index, call.function.name, call.function.arguments) == (0, "f", '{"x": 1}')
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "tool_calls"


def test_the_answer_of_a_tool_is_rendered(taught: openai.OpenAI) -> None:
    """Log-probs of the prompt are not returned, so the number of its tokens shows what was rendered."""
    message = chat(taught, tools=[TOOL]).choices[0].message
    past = [*QUESTION, message.model_dump(exclude_none=True)]
    result: Any = {"role": "tool", "content": "3", "tool_call_id": message.tool_calls[0].id}
    reply = chat(taught, messages=[*past, result], tools=[TOOL], max_completion_tokens=1)
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    plain = [*QUESTION, {"role": "assistant", "content": "ok", "reasoning_content": "hm", "tool_calls": [call]}, result]
    prompt = ChatTemplate(TEMPLATE, chat_tokenizer()).prompt(plain, tools=[TOOL])
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == 1


def test_tools_are_not_shown_with_tool_choice_none(taught: openai.OpenAI) -> None:
    counts = [
        chat(taught, tools=tools, tool_choice=choice, max_completion_tokens=1).usage.prompt_tokens
        for tools, choice in (([TOOL], "auto"), ([TOOL], "none"), (openai.omit, openai.omit))
    ]
    assert counts[0] > counts[1] == counts[2]


def test_variables_of_the_template(taught: openai.OpenAI) -> None:
    plain, fast = (
        chat(taught, max_completion_tokens=1, extra_body={"chat_template_kwargs": {"fast": fast}}).usage.prompt_tokens
        for fast in (False, True)
    )
    assert fast == plain + len(chat_tokenizer().encode("<think></think>"))


def test_stop_texts_log_probs_and_choices(client: openai.OpenAI) -> None:
    reply = chat(client, n=3, temperature=1, seed=5, logprobs=True, top_logprobs=2, max_completion_tokens=6)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    for choice in reply.choices:
        assert 0 < len(choice.logprobs.content) <= 6
        for entry in choice.logprobs.content:
            assert len(entry.top_logprobs) == 2
            assert entry.logprob <= max(top.logprob for top in entry.top_logprobs) + 1e-6
            assert entry.bytes
    text = chat(client, max_completion_tokens=12).choices[0].message.content
    stop = text[4:6]
    assert chat(client, max_completion_tokens=12, stop=stop).choices[0].message.content == text[: text.index(stop)]


def test_control_tokens_in_a_message_are_text(server: Any, client: openai.OpenAI) -> None:
    message = [{"role": "user", "content": "<|im_end|>"}]
    wanted = ChatTemplate("{{ messages[0].content }}", server.tokenizer)
    assert len(server.tokenizer.encode("<|im_end|>")) > 1
    plain = chat(client, messages=[{"role": "user", "content": "a"}], max_completion_tokens=1).usage.prompt_tokens
    used = chat(client, messages=message, max_completion_tokens=1).usage.prompt_tokens
    assert used - plain == len(wanted.encode(wanted.render(message))) - 1


def test_without_a_limit_the_answer_may_fill_the_context(client: openai.OpenAI) -> None:
    usage = chat(client, max_completion_tokens=None, temperature=0).usage
    assert usage.total_tokens <= 512


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "boss", "content": "a"}]}, "messages.0.role: "),
        ({"messages": [{"role": "user"}]}, "a user message has no content"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages.0.name is not a parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0"),
        ({"tool_choice": "auto"}, "tool_choice has no effect"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice: "),
        ({"top_logprobs": 2}, "top_logprobs has no effect"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"response_format": {"type": "json_object"}}, "response_format: is not supported"),
        ({"extra_body": {"chat_template_kwargs": {"generation_prompt": 1}}}, "no variable 'generation_prompt'"),
        ({"extra_body": {"chat_template_kwargs": {"messages": 1}}}, "no variable 'messages'"),
        ({"extra_body": {"functions": []}}, "functions is not a parameter"),
        ({"messages": [{"role": "user", "content": "a" * 900_000}]}, "900000 characters"),
    ],
)
def test_what_is_not_supported_is_refused(client: openai.OpenAI, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        chat(client, **parameters)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"messages": [{"role": "assistant", "content": "a", "reasoning_content": "b"}]}, "has no reasoning_content"),
        ({"tools": [TOOL]}, "chat template has no tools"),
    ],
)
def test_what_a_chat_template_lacks_is_refused(alone: Any, parameters: dict[str, Any], message: str) -> None:
    with (
        running(alone, template="{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}") as server,
        openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match=message),
    ):
        chat(client, **parameters)
