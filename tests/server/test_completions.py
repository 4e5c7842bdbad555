"""/v1/completions with the official client: every parameter has its effect, or is refused.

A tiny random model; greedy texts are compared with the engine's own.
"""

import math
from typing import Any

import openai
import pytest

PROMPT = "def main"


def complete(client: openai.OpenAI, **parameters: Any) -> Any:
    return client.completions.create(**{"model": "policy", "prompt": PROMPT, "max_tokens": 24, **parameters})


def texts(reply: Any) -> list[str]:
    return [choice.text for choice in reply.choices]


def token_ids(choice: Any) -> list[int]:
    return [int(name.removeprefix("token_id:")) for name in choice.logprobs.tokens]


@pytest.fixture(scope="module")
def greedy(client: openai.OpenAI) -> str:
    return complete(client, temperature=0).choices[0].text


def test_greedy_text_and_log_probs_are_those_of_the_engine(server: Any, client: openai.OpenAI) -> None:
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling

    tokenizer = server.tokenizer
    stop = frozenset({tokenizer.eod, tokenizer.id_of("<|im_end|>")})
    sampling = Sampling(24, 0.0, stop_tokens=stop, vocab_size=tokenizer.vocab_size)
    (wanted,) = generate(server.thread._model, [tokenizer.encode(PROMPT)], sampling)
    choice = complete(client, temperature=0, logprobs=0, extra_body={"return_tokens_as_token_ids": True}).choices[0]
    assert token_ids(choice) == wanted.tokens
    assert choice.text == tokenizer.decode(token for token in wanted.tokens if token not in stop)
    assert choice.finish_reason == wanted.finish_reason
    # the server's are over the tokenizer's vocabulary, without the embedding's padding rows
    assert choice.logprobs.token_logprobs == pytest.approx(wanted.logprobs, abs=1)
    assert all(a >= b - 1e-5 for a, b in zip(choice.logprobs.token_logprobs, wanted.logprobs))


def test_token_ids_as_prompts_equal_their_text(server: Any, client: openai.OpenAI, greedy: str) -> None:
    ids = server.tokenizer.encode(PROMPT)
    assert texts(complete(client, prompt=ids, temperature=0)) == [greedy]
    assert texts(complete(client, prompt=[ids, ids], temperature=0)) == [greedy] * 2
    assert texts(complete(client, prompt=[PROMPT, "x"], temperature=0))[0] == greedy


def test_stream_equals_the_whole_reply(client: openai.OpenAI, greedy: str) -> None:
    options = {"include_usage": True}
    chunks = list(complete(client, temperature=0, stream=True, stream_options=options))
    *pieces, last = chunks
    assert len(pieces) > 5, "text arrives in pieces"
    assert "".join(chunk.choices[0].text for chunk in pieces) == greedy
    assert [chunk.choices[0].finish_reason for chunk in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == "length"
    assert (last.choices, last.usage.completion_tokens) == ([], 24)
    assert not any(chunk.usage for chunk in complete(client, temperature=0, stream=True))


def test_usage_counts_tokens(server: Any, client: openai.OpenAI) -> None:
    usage = complete(client, prompt=[PROMPT, "x"], n=3, max_tokens=5, stop=None, temperature=0).usage
    num_prompt_tokens = len(server.tokenizer.encode(PROMPT)) + len(server.tokenizer.encode("x"))
    assert usage.prompt_tokens == num_prompt_tokens
    assert usage.completion_tokens <= 30
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_seeds_repeat_samples_and_choices_differ(client: openai.OpenAI) -> None:
    first, again = (texts(complete(client, n=4, seed=11)) for _ in range(2))
    assert first == again
    assert len(set(first)) == 4
    assert first != texts(complete(client, n=4, seed=12))
    assert texts(complete(client)) != texts(complete(client)), "without a seed samples differ"


def test_a_stop_text_ends_the_text_before_it(client: openai.OpenAI, greedy: str) -> None:
    stop = greedy[7:10]
    wanted = greedy[: greedy.index(stop)]
    for stream in (False, True):
        reply = complete(client, temperature=0, stop=["never found", stop], stream=stream)
        choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
        assert "".join(choice.text for choice in choices) == wanted
        assert choices[-1].finish_reason == "stop"


def test_stop_tokens_end_the_text_and_are_not_part_of_it(server: Any, client: openai.OpenAI) -> None:
    extra = {"return_tokens_as_token_ids": True}
    free = token_ids(complete(client, temperature=0, logprobs=0, extra_body=extra).choices[0])
    end = free.index(free[5])
    choice = complete(client, temperature=0, logprobs=0, extra_body=extra | {"stop_token_ids": [free[5]]}).choices[0]
    assert token_ids(choice) == free[: end + 1]
    assert choice.finish_reason == "stop"
    assert choice.text == server.tokenizer.decode(free[:end])


def test_log_probs_and_alternatives(client: openai.OpenAI) -> None:
    logprobs = complete(client, temperature=0, logprobs=3).choices[0].logprobs
    for name, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
        assert len(top) == 3
        assert top[name] == max(top.values()) == logprob < 0, "greedy takes the most probable token"
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    assert sum(math.exp(p) for p in logprobs.top_logprobs[0].values()) < 1
    assert complete(client).choices[0].logprobs is None


def test_sampling_parameters_have_their_effect(client: openai.OpenAI, greedy: str) -> None:
    assert texts(complete(client, extra_body={"top_k": 1})) == [greedy]
    assert texts(complete(client, top_p=1e-6)) == [greedy]
    assert texts(complete(client, temperature=0.001)) == [greedy]
    assert texts(complete(client, extra_body={"top_k": -1}, seed=4)) == texts(complete(client, seed=4))
    assert texts(complete(client, extra_body={"top_k": 3}, seed=4)) != texts(complete(client, seed=4))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"extra_body": {"min_p": 0.1}}, "min_p is not a parameter"),
        ({"extra_body": {"temperatur": 0.1}}, "Did you mean 'temperature'"),
        ({"temperature": -1}, "temperature: must be 0 .greedy. or from 0.001 to 1000"),
        ({"temperature": 1e-40}, "temperature: must be 0"),
        ({"top_p": 0}, "top_p: must be above 0"),
        ({"top_p": 1.5}, "top_p: must be above 0"),
        ({"extra_body": {"top_k": -2}}, "top_k: "),
        ({"n": 0}, "n: "),
        ({"n": 65}, "more than 64 completions"),
        ({"prompt": ["a"] * 33, "n": 2}, "more than 64 completions"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 600}, "Shorten the prompt or generate less"),
        ({"prompt": "x" * 900_000}, "a prompt of 900000 characters has more than the model's 512 tokens"),
        ({"prompt": []}, "prompt must be a text"),
        ({"prompt": [[]]}, "prompt must be a text"),
        ({"prompt": [1, "a"]}, "prompt must be a text"),
        ({"prompt": ""}, "prompt 1 is empty"),
        ({"prompt": [320]}, "ids go from 0 to 319"),
        ({"prompt": [-1]}, "ids go from 0 to 319"),
        ({"extra_body": {"stop_token_ids": [999]}}, "stop token 999"),
        ({"stop": ["a"] * 17}, "up to 16"),
        ({"stop": ""}, "none of them empty"),
        ({"echo": True}, "echo: is not supported"),
        ({"suffix": "a"}, "suffix: is not supported"),
        ({"best_of": 5}, "best_of is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: is not supported"),
        ({"logit_bias": {"5": 100}}, "logit_bias: is not supported"),
        ({"logprobs": 21}, "logprobs: "),
        ({"stream_options": {"include_usage": True}}, "stream_options has no effect"),
    ],
)
def test_what_is_not_supported_is_refused(client: openai.OpenAI, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        complete(client, **parameters)


def test_parameters_without_effect_are_accepted(client: openai.OpenAI, greedy: str) -> None:
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "best_of": 1,
        "echo": False,
        "user": "me",
        "logit_bias": {},
    }
    assert texts(complete(client, temperature=0, **neutral)) == [greedy]


def test_models_and_unknown_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["policy"]
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; this server has 'policy'"):
        complete(client, model="gpt")


def test_drafts_do_not_change_greedy_texts(alone: Any, server: Any, greedy: str) -> None:
    """A second server of the same model with speculative decoding, requests of several kinds at once."""
    from concurrent.futures import ThreadPoolExecutor

    from tests.server.tiny_server import running

    with running(alone, draft_depth=2) as drafting, openai.OpenAI(base_url=drafting.url, api_key="none") as client:
        kinds: list[dict[str, Any]] = [
            {"temperature": 0},
            {"temperature": 1.0, "seed": 1},
            {"temperature": 0.7, "top_p": 0.9},
        ]
        with ThreadPoolExecutor(6) as threads:
            replies = list(threads.map(lambda kind: complete(client, **kind), kinds * 2))
        assert texts(replies[0]) == texts(replies[3]) == [greedy]
