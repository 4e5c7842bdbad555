"""Decoding with a carried state equals recomputation: tokens, chunks, packed prompts, batches, rolled-back drafts.

fp32, one process, torch backend. Layouts: tests/inference/test_layouts.py; GPU: tests/inference/test_gpu.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.inference.tiny_model import full_logits, random_prompts, tiny_model

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(alone: Any) -> Any:
    return tiny_model(alone)


def run(model: Any, chunks: list[list[int]], state: Any, **options: Any) -> list[Tensor]:
    """Extend every sequence by its chunk; return the logits of each."""
    from megatron_q3n.model.decode.forward import compute_logits, extend, generating
    from megatron_q3n.model.decode.span import Span

    counts = [len(chunk) for chunk in chunks]
    device = next(model.parameters()).device
    tokens = torch.tensor([t for chunk in chunks for t in chunk], device=device)
    with generating(model), torch.no_grad():
        hidden = extend(model, tokens, Span(state.lengths, counts, device), state, **options)
        return list(compute_logits(model, hidden).cpu().split(counts))


def decoded(model: Any, prompts: list[list[int]], cuts: list[list[int]]) -> list[Tensor]:
    """Run every prompt in chunks that end at its cuts, all prompts in one batch."""
    from megatron_q3n.model.decode.state import DecodeState

    state = DecodeState.empty(model, len(prompts))
    logits: list[list[Tensor]] = [[] for _ in prompts]
    for ends in zip(*cuts):
        chunks = [p[start:end] for p, start, end in zip(prompts, state.lengths, ends)]
        for row, out in enumerate(run(model, chunks, state)):
            logits[row].append(out)
        state.commit([len(chunk) for chunk in chunks])
    return [torch.cat(parts) for parts in logits]


def assert_equal_to_full(model: Any, prompts: list[list[int]], logits: list[Tensor]) -> None:
    for prompt, ours in zip(prompts, logits):
        expected = full_logits(model, prompt)
        torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)
        assert ours.argmax(-1).tolist() == expected.argmax(-1).tolist()


def test_token_by_token_over_512_tokens(model: Any) -> None:
    prompts = random_prompts([532], 64)
    assert_equal_to_full(model, prompts, decoded(model, prompts, [list(range(20, 533))]))


def test_a_batch_of_unequal_lengths_token_by_token(model: Any) -> None:
    prompts = random_prompts([3 + 60, 90 + 60, 1 + 60], 64)
    cuts = [list(range(start, start + 61)) for start in (3, 90, 1)]
    assert_equal_to_full(model, prompts, decoded(model, prompts, cuts))


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_a_prompt_in_chunks(model: Any, chunk: int) -> None:
    prompts = random_prompts([200], 64)
    cuts = [*range(chunk, 200, chunk), 200]
    assert_equal_to_full(model, prompts, decoded(model, prompts, [cuts]))


def test_packed_chunks_that_continue_sequences(model: Any) -> None:
    """The second call packs chunks of different lengths after prefixes of different lengths."""
    prompts = random_prompts([70, 40, 90, 30], 64)
    cuts = [[1, 70], [30, 40], [65, 90], [29, 30]]
    assert_equal_to_full(model, prompts, decoded(model, prompts, cuts))


def test_equal_chunks_run_as_a_batch_longer_than_a_short_span(model: Any) -> None:
    prompts = random_prompts([80, 100], 64)
    assert_equal_to_full(model, prompts, decoded(model, prompts, [[40, 80], [60, 100]]))


@pytest.mark.parametrize("accepted", [[1, 1, 1], [4, 4, 4], [1, 3, 4]])
def test_rejected_drafts_are_rolled_back(model: Any, accepted: list[int]) -> None:
    from megatron_q3n.model.decode.state import DecodeState

    truth = random_prompts([50, 20, 33], 64)
    lengths = [40, 10, 23]
    state = DecodeState.empty(model, 3)
    run(model, [p[:n] for p, n in zip(truth, lengths)], state)
    state.commit(lengths)
    drafts = [p[n : n + k] + [(t + 1) % 64 for t in p[n + k : n + 4]] for p, n, k in zip(truth, lengths, accepted)]
    run(model, drafts, state, state_per_token=True)
    state.commit(accepted)
    rest = [p[n + k : n + 8] for p, n, k in zip(truth, lengths, accepted)]
    after = run(model, rest, state)
    for prompt, start, k, ours in zip(truth, lengths, accepted, after):
        expected = full_logits(model, prompt[: start + 8])[start + k :]
        torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)


def test_rows_are_joined_and_selected(model: Any) -> None:
    from megatron_q3n.model.decode.state import DecodeState

    prompts = random_prompts([150, 30, 60], 64)
    states = []
    for prompt in prompts:
        state = DecodeState.empty(model, 1)
        run(model, [prompt[:-1]], state)
        state.commit([len(prompt) - 1])
        states.append(state)
    joined = states[0].join(states[1]).join(states[2]).select([2, 0])
    assert joined.lengths == [59, 149]
    selected = [prompts[2], prompts[0]]
    for prompt, ours in zip(selected, run(model, [p[-1:] for p in selected], joined)):
        torch.testing.assert_close(ours, full_logits(model, prompt)[-1:], rtol=0, atol=TOLERANCE)


def test_gated_delta_net_state_is_constant_and_kv_cache_linear(model: Any) -> None:
    from megatron_q3n.model.decode.state import DecodeState

    sizes = []
    for length in (10, 1000):
        state = DecodeState.empty(model, 2)
        run(model, random_prompts([length, length], 64), state)
        state.commit([length, length])
        sizes.append(state.num_bytes())
    (delta_short, kv_short), (delta_long, kv_long) = sizes
    config = model.config
    channels = 2 * 4 * 16 + 8 * 16
    per_layer = 4 * (channels * 3 + 8 * 16 * 16)  # fp32: conv inputs, and a matrix per value head
    assert delta_short == delta_long == 2 * 3 * per_layer
    per_token = 2 * config.num_query_groups * config.kv_channels * 4
    assert kv_short == 2 * 64 * per_token
    assert kv_long == 2 * 1024 * per_token


def test_the_mtp_layer_decodes_as_it_was_trained(model: Any) -> None:
    """At depth 1, over a prefix in chunks, hidden states equal those of megatron-core's own MTP forward."""
    from megatron_q3n.model.decode.forward import extend, extend_mtp, generating
    from megatron_q3n.model.decode.span import Span
    from megatron_q3n.model.decode.state import DecodeState

    device = next(model.parameters()).device
    tokens = torch.tensor(random_prompts([41], 64)[0], device=device)
    outputs: list[Tensor] = []
    hook = model.mtp.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    with torch.no_grad():
        model.train()  # an evaluation without labels skips the layer
        model(tokens[None, :-1], torch.arange(40, device=device)[None], None, runtime_gather_output=True)
    hook.remove()
    expected = outputs[0].chunk(2)[1][:, 0]
    state = DecodeState.empty(model, 1)
    ours = []
    with generating(model), torch.no_grad():
        for start, end in ((0, 17), (17, 18), (18, 39)):
            span = Span([start], [end - start], tokens.device)
            hidden = extend(model, tokens[start:end], span, state)
            ours.append(extend_mtp(model, hidden, tokens[start + 1 : end + 1], span, state))
            state.commit([end - start])
    # megatron-core rolls the tokens, so its last position has no next token
    torch.testing.assert_close(torch.cat(ours), expected[:39], rtol=0, atol=TOLERANCE)


def test_the_training_mode_is_restored(model: Any) -> None:
    from megatron_q3n.model.decode.forward import generating

    model.train()
    with generating(model):
        assert not model.training
    assert model.training
    with pytest.raises(RuntimeError, match="interrupted"), generating(model):
        raise RuntimeError("interrupted")
    assert model.training
