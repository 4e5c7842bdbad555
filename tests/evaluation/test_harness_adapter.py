"""Adapter of lm-evaluation-harness: generation settings by the harness's rules, stop tokens, shared tokens.

A tiny random model; greedy completions and scores are compared with the model's own.
"""

from typing import Any

import pytest
import torch

from megatron_q3n.config import UserError
from megatron_q3n.data.tokenizer import TextTokenizer, train_bpe
from tests.inference.tiny_model import full_logits, tiny_model

pytest.importorskip("lm_eval")
VOCAB = 300


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_bpe(["the answer is forty two. the answers are here "] * 20, VOCAB)


@pytest.fixture(scope="module")
def model(alone: Any) -> Any:
    return tiny_model(alone, vocab_size=320, max_position_embeddings=512)


@pytest.fixture(scope="module")
def harness(alone: Any, model: Any, tokenizer: TextTokenizer) -> Any:
    from megatron_q3n.evaluation.harness_adapter import HarnessModel

    return HarnessModel(model, tokenizer, alone[1].groups.dp, tokens_per_pass=256, draft_depth=0)


def instances(kind: str, *arguments: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


def complete(harness: Any, **settings: Any) -> str:
    (text,) = harness.generate_until(instances("generate_until", ("the answer", settings)))
    return text


def greedy(model: Any, tokenizer: TextTokenizer, count: int) -> list[int]:
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling

    sampling = Sampling(count, 0.0, vocab_size=tokenizer.vocab_size)
    return generate(model, [tokenizer.encode("the answer")], sampling)[0].tokens


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_every_name_of_the_token_limit(harness: Any, model: Any, tokenizer: TextTokenizer, name: str) -> None:
    assert complete(harness, **{name: 5}) == tokenizer.decode(greedy(model, tokenizer, 5))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, (0.0, None, 1.0)),
        ({"temperature": 1.0}, (1.0, None, 1.0)),
        ({"do_sample": True}, (1.0, None, 1.0)),
        ({"do_sample": False, "temperature": 0.7}, (0.0, None, 1.0)),
        ({"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9}, (0.7, 5, 0.9)),
        ({"temperature": None, "top_k": -1, "top_p": None}, (0.0, None, 1.0)),
        ({"temperature": 0.5, "top_k": 0}, (0.5, None, 1.0)),
        ({"top_k": None, "repetition_penalty": 1.0, "num_beams": 1}, (0.0, None, 1.0)),
    ],
)
def test_sampling_settings(harness: Any, settings: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    from megatron_q3n.evaluation.harness_adapter import _normalized

    sampling = harness._sampling(_normalized(settings))
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == wanted
    assert sampling.max_new_tokens == 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 512}, "max_gen_toks=512, but the model has only 512"),
        ({"max_gen_toks": 5, "temperature": -1.0}, "temperature=-1.0: it must be 0"),
        ({"max_gen_toks": 5, "repetition_penalty": 1.2}, "repetition_penalty=1.2, which is not supported"),
        ({"max_gen_toks": 5, "top_k": -2}, "top_k=-2 must be at least 1"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(harness: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        complete(harness, **settings)


def test_the_stop_token_is_not_part_of_the_answer(
    alone: Any, model: Any, tokenizer: TextTokenizer, harness: Any
) -> None:
    from megatron_q3n.evaluation.harness_adapter import HarnessModel

    tokens = greedy(model, tokenizer, 12)
    stop = tokens[6]
    stopping = HarnessModel(
        model, tokenizer, alone[1].groups.dp, tokens_per_pass=256, draft_depth=0, stop_tokens=frozenset({stop})
    )
    assert complete(stopping, max_gen_toks=12) == tokenizer.decode(tokens[: tokens.index(stop)])


def test_until_ends_the_answer(harness: Any, model: Any, tokenizer: TextTokenizer) -> None:
    text = tokenizer.decode(greedy(model, tokenizer, 12))
    for until in (text[3:5], [text[3:5], "never"]):
        assert complete(harness, max_gen_toks=12, until=until) == text[: text.index(text[3:5])]


def test_a_continuation_that_shares_its_token_with_the_context(
    harness: Any, model: Any, tokenizer: TextTokenizer
) -> None:
    context, continuation = "the answe", "r"
    whole = tokenizer.encode(context + continuation)
    assert len(whole) <= len(tokenizer.encode(context)), "the split of the harness has nothing to score"
    before, after = harness._encode_pair(context, continuation)
    assert before + after in (whole, [tokenizer.eod, *whole])
    (found, empty) = harness.loglikelihood(instances("loglikelihood", (context, continuation), ("the", "")))
    logits = full_logits(model, (before + after)[:-1]).log_softmax(-1)[len(before) - 1 :]
    wanted = logits.gather(-1, torch.tensor(after)[:, None]).sum().item()
    assert found[0] == pytest.approx(wanted, abs=1e-3)
    assert empty == (0.0, True)


def test_other_continuations_are_split_as_by_the_harness(harness: Any, tokenizer: TextTokenizer) -> None:
    from lm_eval.api.model import TemplateLM

    for context, continuation in (("the answer", " is"), ("the answer ", "is forty"), ("x", " two")):
        assert harness._encode_pair(context, continuation) == TemplateLM._encode_pair(harness, context, continuation)


def test_a_continuation_beyond_the_context_is_refused(harness: Any) -> None:
    with pytest.raises(UserError, match="the model has only 512 positions"):
        harness.loglikelihood(instances("loglikelihood", ("the", "?" * 1200)))
