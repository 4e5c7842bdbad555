"""Rounds in buffers that several lengths share, as CUDA graphs need them: the same tokens as without.

Run without a capture, which needs a GPU (test_gpu.py): padding, moving in and out, sequences that join
and leave, two generations in the same buffers.
"""

from collections import OrderedDict
from typing import Any

import pytest
import torch

from megatron_q3n.config import UserError
from tests.inference.tiny_model import random_prompts, tiny_model

LENGTHS = [5, 70, 1, 33, 12]


@pytest.fixture(scope="module")
def model(alone: Any) -> Any:
    return tiny_model(alone, vocab_size=8)


def in_rooms(model: Any, prompts: list[list[int]], rooms: Any = None, **options: Any) -> Any:
    """Prepare a generation whose rounds run in rooms that are not captured."""
    from megatron_q3n.inference.decode_graph import Room, RoundGraphs
    from megatron_q3n.inference.generate import start

    class Uncaptured(RoundGraphs):
        def _build(self, rows: int, positions: int) -> Room:
            return Room(self._rounds, rows, positions)

        def _experts_fit(self, rows: int) -> bool:
            return True

    generation = start(model, prompts, options.pop("sampling"), **options)
    graphs = Uncaptured(generation._engine._rounds, False)
    graphs.obstacle, graphs._kept = None, OrderedDict() if rooms is None else rooms
    generation._engine.graphs = graphs
    return generation


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_tokens_as_without(model: Any, depth: int, temperature: float) -> None:
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling

    prompts = random_prompts(LENGTHS, 8)
    sampling = Sampling(40, temperature, stop_tokens=frozenset({3}) if temperature else frozenset())
    options = {"draft_depth": depth, "max_sequences": 3, "prefill_tokens": 30}
    wanted = generate(model, prompts, sampling, **options)
    generation = in_rooms(model, prompts, sampling=sampling, **options)
    assert sum(1 for _ in generation) > 0
    assert [c.tokens for c in generation.completions] == [c.tokens for c in wanted]
    for ours, theirs in zip(generation.completions, wanted):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert (ours.drafted, ours.accepted) == (theirs.drafted, theirs.accepted)
    rooms = generation._engine.graphs._kept
    assert len({key[0] for key in rooms}) > 1, "rows with padding (three sequences in four) and without"
    if temperature:
        assert len({len(c.tokens) for c in wanted}) > 1, "some stop early"


@pytest.mark.parametrize("tokens", [1, 3])
def test_states_in_a_stack_are_kept_like_any(model: Any, tokens: int) -> None:
    """Room for the states of all layers at once, and the row of each sequence that is kept."""
    from megatron_q3n.model.decode.forward import extend, generating
    from megatron_q3n.model.decode.span import Span
    from megatron_q3n.model.decode.state import DecodeState

    device = next(model.parameters()).device
    states = [DecodeState.empty(model, 2) for _ in range(2)]
    states[1].stack_up()
    row_N = torch.tensor([0, 2 * tokens - 1], device=device)
    ids = torch.randint(0, 8, (2 * tokens,), device=device)
    for start in (0, 10):
        for state in states:
            span = Span([start] * 2, [tokens] * 2, device)
            with generating(model), torch.no_grad():
                extend(model, ids, span, state, each_prefix=True)
            assert (state.trial is not None) == (state is states[1])
            state.keep(row_N)
    delta = [[x for x in state.layers if hasattr(x, "delta")] for state in states]
    assert len(delta[0]) > 1
    for ours, wanted in zip(delta[1], delta[0]):
        torch.testing.assert_close(ours.delta, wanted.delta)
        torch.testing.assert_close(ours.conv, wanted.conv)
        assert ours.delta.abs().max() > 0
    assert states[1].select([0]).stack is None


def test_two_generations_take_turns_in_the_same_room(model: Any) -> None:
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling

    sampling, rooms = Sampling(20, 0.0), OrderedDict()
    prompts = random_prompts([9, 30], 8)
    wanted = [generate(model, [p], sampling, draft_depth=1)[0].tokens for p in prompts]
    both = [in_rooms(model, [p], rooms, sampling=sampling, draft_depth=1) for p in prompts]
    turns = [iter(generation) for generation in both]
    while turns:
        turns = [turn for turn in turns if next(turn, None) is not None]
    assert [generation.completions[0].tokens for generation in both] == wanted
    assert len(rooms) == 1


def test_room_for_positions_grows_by_at_most_a_quarter() -> None:
    from megatron_q3n.inference.decode_graph import room_for

    sizes = {room_for(n) for n in range(1, 20000)}
    assert len(sizes) < 60
    assert all(n <= room_for(n) <= max(256, n * 1.25 + 1) for n in range(1, 20000))


def test_graphs_that_must_be_and_cannot_are_refused(model: Any) -> None:
    from megatron_q3n.inference.generate import start
    from megatron_q3n.inference.sampling import Sampling

    if torch.cuda.is_available():
        pytest.skip("here they can")
    with pytest.raises(UserError, match="there is no GPU"):
        start(model, [[1]], Sampling(1), cuda_graph=True)
    generation = start(model, [[1]], Sampling(1), cuda_graph=None)
    assert generation.without_graphs == "there is no GPU"


def test_few_experts_equal_the_layer(alone: Any) -> None:
    """Every number of tokens that takes the short way, against megatron-core's layer with our dispatcher."""
    from megatron_q3n.model.decode import experts as decode_experts

    for settings in ({"num_moe_experts": 8, "moe_router_topk": 3}, {"moe_router_enable_expert_bias": True}):
        model = tiny_model(alone, **settings).eval()
        moe = next(x.mlp for x in model.decoder.layers if hasattr(x.mlp, "router"))
        if moe.router.expert_bias is not None:
            moe.router.expert_bias.normal_()
        with torch.no_grad():
            for shape in ((1, 1), (2, 3), (16, 1)):
                hidden = torch.randn(*shape, 32, device=next(model.parameters()).device)
                assert decode_experts.serves(moe, shape[0] * shape[1])
                residual = torch.randn_like(hidden)
                wanted = residual + moe(hidden)[0]
                ours = decode_experts.add_few_experts(moe, hidden, residual)
                torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
            assert not decode_experts.serves(moe, 17)
        assert not decode_experts.serves(moe, 1), "with gradients"
