"""Completions: greedy against recomputation, with and without drafts, in any batch; token limits; bad input.

fp32, one process, torch backend.
"""

import itertools
from typing import Any

import pytest
import torch

from megatron_q3n.config import UserError
from tests.inference.chi_square import z_score
from tests.inference.tiny_model import full_logits, random_prompts, tiny_model

PROMPT_LENGTHS = [5, 70, 1, 130]


@pytest.fixture(scope="module")
def model(alone: Any) -> Any:
    return tiny_model(alone)


@pytest.fixture(scope="module")
def small_vocab_model(alone: Any) -> Any:
    """A vocabulary of four tokens, so that drafts of random weights are often accepted."""
    return tiny_model(alone, vocab_size=4)


def complete(model: Any, prompts: list[list[int]], tokens: int = 16, **options: Any) -> list[Any]:
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "stop_tokens", "vocab_size")
    settings = {name: options.pop(name) for name in names if name in options}
    return generate(model, prompts, Sampling(tokens, **settings), **options)


def tokens_of(completions: list[Any]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


def test_greedy_tokens_and_log_probabilities_equal_recomputation(model: Any) -> None:
    prompts = random_prompts(PROMPT_LENGTHS, 64)
    for prompt, done in zip(prompts, complete(model, prompts, temperature=0.0)):
        logits = full_logits(model, prompt + done.tokens)[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == done.tokens
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(done.tokens)[:, None])[:, 0]
        assert done.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        assert done.sampled_logprobs == [0.0] * 16
        assert done.finish_reason == "length"


def test_log_probabilities_under_the_sampled_distribution(model: Any) -> None:
    prompts = random_prompts(PROMPT_LENGTHS, 64)
    for prompt, done in zip(prompts, complete(model, prompts, temperature=0.5, top_k=5)):
        logits = full_logits(model, prompt + done.tokens)[len(prompt) - 1 : -1]
        tokens = torch.tensor(done.tokens)[:, None]
        best = logits.topk(5)
        top_five = (best.values / 0.5).log_softmax(-1)
        rank = (best.indices == tokens).int().argmax(-1, keepdim=True)
        assert (best.indices == tokens).any(-1).all()
        expected = top_five.gather(-1, rank)[:, 0]
        assert done.sampled_logprobs == pytest.approx(expected.tolist(), abs=1e-3)
        unscaled = logits.log_softmax(-1).gather(-1, tokens)[:, 0]
        assert done.logprobs == pytest.approx(unscaled.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_tokens": 16},
        {"prefill_tokens": 1, "max_sequences": 1},
        {"max_sequences": 2},
        {"prefill_tokens": 33, "max_sequences": 3, "draft_depth": 2},
        {"draft_depth": 1},
    ],
)
def test_greedy_tokens_do_not_depend_on_the_schedule(model: Any, options: dict[str, int]) -> None:
    prompts = random_prompts(PROMPT_LENGTHS, 64)
    plain = complete(model, prompts, temperature=0.0)
    scheduled = complete(model, prompts, temperature=0.0, **options)
    assert tokens_of(scheduled) == tokens_of(plain)
    for a, b in zip(scheduled, plain):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_samples_of_a_sequence_depend_on_its_seed_only(model: Any) -> None:
    prompts = random_prompts(PROMPT_LENGTHS, 64)
    batched = tokens_of(complete(model, prompts, seed=7))
    assert batched == tokens_of(complete(model, prompts, seed=7, max_sequences=2))
    alone = complete(model, [prompts[2]], seed=["7.2"])
    assert tokens_of(alone) == [batched[2]]
    assert batched != tokens_of(complete(model, prompts, seed=8))
    same = complete(model, [prompts[0]] * 2, seed=3)
    assert same[0].tokens != same[1].tokens, "equal prompts get different samples"


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_greedy_drafts_change_nothing_over_100_prompts(small_vocab_model: Any, depth: int) -> None:
    from megatron_q3n.inference.sequence import acceptance, mean_acceptance_length

    lengths = [1 + i % 23 for i in range(100)]
    prompts = random_prompts(lengths, 4, seed=depth)
    plain = complete(small_vocab_model, prompts, 24, temperature=0.0)
    drafted = complete(small_vocab_model, prompts, 24, temperature=0.0, draft_depth=depth)
    assert tokens_of(drafted) == tokens_of(plain)
    counts = acceptance(drafted)
    print(depth, counts, mean_acceptance_length(drafted))
    # the test needs both accepted and rejected drafts at every depth
    assert all(0 < accepted < verified for verified, accepted in counts)
    assert [verified for verified, _ in counts[1:]] == [accepted for _, accepted in counts[:-1]]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6, "top_k": 3, "top_p": 0.9}])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_sampled_texts_follow_the_distribution_of_the_model(
    small_vocab_model: Any, depth: int, settings: dict[str, float]
) -> None:
    """Every text of three tokens, against its probability by recomputation."""
    from megatron_q3n.inference.sampling import Sampling, distribution

    prompt, num_samples = [3, 1, 0, 1, 2], 4000
    sampling = Sampling(3, **settings)
    exact = {}
    for text in itertools.product(range(4), repeat=3):
        exact[text] = 1.0
    for pair in itertools.product(range(4), repeat=2):
        p = distribution(full_logits(small_vocab_model, prompt + list(pair))[-3:], sampling)
        for last in range(4):
            exact[(*pair, last)] = (p[0][pair[0]] * p[1][pair[1]] * p[2][last]).item()
    options = {"seed": 1, "draft_depth": depth, "prefill_tokens": 5 * num_samples, **settings}
    done = complete(small_vocab_model, [prompt] * num_samples, 3, **options)
    texts = [tuple(completion.tokens) for completion in done]
    counts = [texts.count(text) for text in exact]
    deviation = z_score(counts, list(exact.values()))
    print(depth, settings, deviation)
    assert deviation < 4
    uniform = [1 / len(exact)] * len(exact)
    assert z_score(counts, uniform) > 10, "the test detects a wrong distribution"


def test_stop_tokens_end_a_text_also_among_drafts(small_vocab_model: Any) -> None:
    prompts = random_prompts([4] * 12, 4)
    free = complete(small_vocab_model, prompts, 40, temperature=0.0)
    for depth in (0, 3):
        stopped = complete(
            small_vocab_model, prompts, 40, temperature=0.0, stop_tokens=frozenset({2}), draft_depth=depth
        )
        assert any(done.finish_reason == "stop" for done in stopped)
        for whole, cut in zip(free, stopped):
            end = whole.tokens.index(2) + 1 if 2 in whole.tokens else 40
            assert cut.tokens == whole.tokens[:end]
            assert cut.finish_reason == ("stop" if 2 in whole.tokens else "length")
            assert len(cut.logprobs) == len(cut.sampled_logprobs) == len(cut.tokens)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_drafts_do_not_exceed_the_token_limit(small_vocab_model: Any, tokens: int) -> None:
    done = complete(small_vocab_model, random_prompts([4] * 6, 4), tokens, draft_depth=3)
    assert [len(completion.tokens) for completion in done] == [tokens] * 6


def test_tokens_are_streamed_as_they_are_sampled(model: Any) -> None:
    from megatron_q3n.inference.generate import start
    from megatron_q3n.inference.sampling import Sampling

    prompts = random_prompts([3, 50], 64)
    generation = start(model, prompts, Sampling(6, 0.0), draft_depth=1)
    model.train()
    parts: list[list[int]] = [[], []]
    reasons: list[Any] = [None, None]
    for chunk in generation:
        assert reasons[chunk.index] is None, "no tokens after the end"
        assert torch.is_grad_enabled(), "the caller's gradient mode is unchanged"
        parts[chunk.index] += chunk.tokens
        reasons[chunk.index] = chunk.finish_reason
    assert model.training
    assert parts == tokens_of(generation.completions)
    assert reasons == ["length", "length"]


def test_no_prompts_give_no_completions(model: Any) -> None:
    assert complete(model, []) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1, 64]], {}, "prompt 1 contains token 64; the vocabulary's ids go from 0 to 63"),
        ([[1] * 2040], {}, "2040 tokens, and 16 new ones make 2056: more than"),
        ([[1]], {"stop_tokens": frozenset({77})}, "stop token 77 is not in the vocabulary"),
    ],
)
def test_bad_input_is_refused(model: Any, prompts: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        complete(model, prompts, **options)


def test_a_model_without_a_repeatable_mtp_layer_is_refused(alone: Any) -> None:
    with pytest.raises(UserError, match="needs a multi-token prediction layer"):
        complete(tiny_model(alone, mtp_num_layers=0), [[1]], draft_depth=1)
    with pytest.raises(UserError, match="2 separate MTP layers"):
        complete(tiny_model(alone, mtp_num_layers=2), [[1]], draft_depth=1)


def test_one_repeated_layer_trained_for_two_depths_drafts_to_any_depth(alone: Any) -> None:
    twice = tiny_model(alone, vocab_size=4, mtp_num_layers=2, mtp_use_repeated_layer=True)
    prompts = random_prompts([5, 9], 4)
    plain = complete(twice, prompts, 20, temperature=0.0)
    assert tokens_of(complete(twice, prompts, 20, temperature=0.0, draft_depth=3)) == tokens_of(plain)


def test_a_model_without_mtp_generates(alone: Any) -> None:
    bare = tiny_model(alone, mtp_num_layers=0)
    prompt = random_prompts([30], 64)
    done = complete(bare, prompt, 8, temperature=0.0)[0]
    assert full_logits(bare, prompt[0] + done.tokens)[29:-1].argmax(-1).tolist() == done.tokens
