"""Decode steps in static buffers that several lengths share, as CUDA graphs need them: the same tokens as without.

Run without a capture, which needs a GPU (test_gpu.py): padding, loading and eviction, sequences that are admitted and
retired, two generations in the same buffers.
"""

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_q3n.config import UserError
from megatron_q3n.config.execution_plan import Decision, Kernel
from tests.execution_plans import fused_plan, use_plan
from tests.inference.tiny_model import random_prompts, tiny_config, tiny_model

LENGTHS = [5, 70, 1, 33, 12]


@pytest.fixture(scope="module")
def model(alone: Any) -> Any:
    return tiny_model(alone, vocab_size=8)


def with_graph_buffers(model: Any, prompts: list[list[int]], graphs_by_key: Any = None, **options: Any) -> Any:
    """Prepare a generation whose decode steps run in static buffers without a capture."""
    from megatron_q3n.inference.decode_graph import DecodeGraphs, GraphBuffers
    from megatron_q3n.inference.generate import start

    class UncapturedGraphs(DecodeGraphs):
        def _build(self, num_rows: int, num_positions: int) -> GraphBuffers:
            return GraphBuffers(self._step, num_rows, num_positions)

        def _runs_without_host_sync(self, num_rows: int) -> bool:
            return True

    generation = start(model, prompts, options.pop("sampling"), **options)
    graphs = UncapturedGraphs(generation._engine._decode_step, False)
    graphs.obstacle, graphs._graphs = None, OrderedDict() if graphs_by_key is None else graphs_by_key
    generation._engine.graphs = graphs
    return generation


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_tokens_as_without_buffers(model: Any, depth: int, temperature: float) -> None:
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling

    prompts = random_prompts(LENGTHS, 8)
    sampling = Sampling(40, temperature, stop_tokens=frozenset({3}) if temperature else frozenset())
    options = {"draft_depth": depth, "max_sequences": 3, "prefill_tokens": 30}
    expected = generate(model, prompts, sampling, **options)
    generation = with_graph_buffers(model, prompts, sampling=sampling, **options)
    assert sum(1 for _ in generation) > 0
    assert [c.tokens for c in generation.completions] == [c.tokens for c in expected]
    for ours, theirs in zip(generation.completions, expected):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert (ours.drafted, ours.accepted) == (theirs.drafted, theirs.accepted)
    graphs = generation._engine.graphs._graphs
    assert len({key[0] for key in graphs}) > 1, "rows with padding (three sequences in four) and without"
    if temperature:
        assert len({len(c.tokens) for c in expected}) > 1, "some stop early"


@pytest.mark.parametrize("tokens", [1, 3])
def test_stacked_states_are_committed_like_separate_ones(model: Any, tokens: int) -> None:
    """Draft buffers for the states of all layers, and a commit of one row for each sequence."""
    from megatron_q3n.model.decode.forward import extend, generating
    from megatron_q3n.model.decode.span import Span
    from megatron_q3n.model.decode.state import DecodeState

    device = next(model.parameters()).device
    states = [DecodeState.empty(model, 2) for _ in range(2)]
    states[1].stack_states()
    row_N = torch.tensor([0, 2 * tokens - 1], device=device)
    ids = torch.randint(0, 8, (2 * tokens,), device=device)
    for start in (0, 10):
        for state in states:
            span = Span([start] * 2, [tokens] * 2, device)
            with generating(model), torch.no_grad():
                extend(model, ids, span, state, state_per_token=True)
            assert (state.draft_stack is not None) == (state is states[1])
            state.commit_states(row_N)
    delta = [[x for x in state.layers if hasattr(x, "delta")] for state in states]
    assert len(delta[0]) > 1
    for ours, expected in zip(delta[1], delta[0]):
        torch.testing.assert_close(ours.delta, expected.delta)
        torch.testing.assert_close(ours.conv, expected.conv)
        assert ours.delta.abs().max() > 0
    assert states[1].select([0]).stack is None


def test_two_generations_alternate_in_the_same_buffers(model: Any) -> None:
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling

    sampling, graphs = Sampling(20, 0.0), OrderedDict()
    prompts = random_prompts([9, 30], 8)
    expected = [generate(model, [p], sampling, draft_depth=1)[0].tokens for p in prompts]
    both = [with_graph_buffers(model, [p], graphs, sampling=sampling, draft_depth=1) for p in prompts]
    iterators = [iter(generation) for generation in both]
    while iterators:
        iterators = [iterator for iterator in iterators if next(iterator, None) is not None]
    assert [generation.completions[0].tokens for generation in both] == expected
    assert len(graphs) == 1


def test_positions_are_rounded_up_by_at_most_a_quarter() -> None:
    from megatron_q3n.inference.decode_graph import round_up_positions

    sizes = {round_up_positions(n) for n in range(1, 20000)}
    assert len(sizes) < 60
    assert all(n <= round_up_positions(n) <= max(256, n * 1.25 + 1) for n in range(1, 20000))


def test_required_graphs_that_are_not_possible_are_refused(model: Any) -> None:
    from megatron_q3n.inference.generate import start
    from megatron_q3n.inference.sampling import Sampling

    if torch.cuda.is_available():
        pytest.skip("graphs are possible here")
    with pytest.raises(UserError, match="=true: no GPU"):
        start(model, [[1]], Sampling(1), cuda_graph=True)
    generation = start(model, [[1]], Sampling(1), cuda_graph=None)
    assert generation.cuda_graph_obstacle == "no GPU"


def test_observed_passes_are_not_captured(model: Any) -> None:
    """A captured pass would record or replay the routes of its capture."""
    from megatron_q3n.inference.generate import start
    from megatron_q3n.inference.sampling import Sampling
    from megatron_q3n.model.moe.routing_replay import RoutingReplay

    plan = model.config.plan
    possible = replace(plan, decode=replace(plan.decode, cuda_graph=Decision(True, "CUDA graph")))
    router = next(x.mlp.router for x in model.decoder.layers if hasattr(x.mlp, "router"))
    with use_plan(model, possible):
        assert start(model, [[1]], Sampling(1), cuda_graph=None).cuda_graph_obstacle is None
        with model.config.pass_state.with_routing({router: RoutingReplay()}):
            generation = start(model, [[1]], Sampling(1), cuda_graph=None)
            assert "recorded or replayed" in (generation.cuda_graph_obstacle or "")
            with pytest.raises(UserError, match="recorded or replayed"):
                start(model, [[1]], Sampling(1), cuda_graph=True)


@pytest.mark.parametrize(
    "settings", [{"num_moe_experts": 8, "moe_router_topk": 3}, {"moe_router_enable_expert_bias": True}]
)
def test_decode_experts_equal_the_layer(alone: Any, settings: dict[str, Any]) -> None:
    """Numbers of tokens that decode experts serve, against megatron-core's layer with our dispatcher."""
    from megatron_q3n.model.decode.experts import add_moe_output, runs_in_place

    model = tiny_model(alone, **settings).eval()
    moe = next(x.mlp for x in model.decoder.layers if hasattr(x.mlp, "router"))
    if moe.router.expert_bias is not None:
        moe.router.expert_bias.normal_()
    with torch.no_grad():
        for shape in ((1, 1), (2, 3), (16, 1)):
            hidden = torch.randn(*shape, 32, device=next(model.parameters()).device)
            assert runs_in_place(moe, shape[0] * shape[1])
            residual = torch.randn_like(hidden)
            expected = residual + moe(hidden)[0]
            ours = add_moe_output(moe, hidden, residual)
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert not runs_in_place(moe, 17)
    assert not runs_in_place(moe, 1), "with gradients"


def test_recorded_and_replayed_routes_use_the_layer(alone: Any) -> None:
    """Decode experts ignore a RoutingReplay, so they do not run while it is active; nor does a CUDA graph."""
    from megatron_q3n.model.decode.experts import runs_in_place, runs_without_host_sync
    from megatron_q3n.model.moe.routing_replay import RoutingReplay

    model = tiny_model(alone, num_layers=2, mixer_pattern="*").eval()
    moe = next(x.mlp for x in model.decoder.layers if hasattr(x.mlp, "router"))
    kernels = {Kernel.PERMUTATION, Kernel.GROUPED_GEMM}
    replay = RoutingReplay()
    with torch.no_grad():
        assert not runs_without_host_sync(moe, 17), "many tokens are sorted on the host without kernels"
        with use_plan(model, fused_plan(tiny_config(), kernels)):
            with model.config.pass_state.with_routing({moe.router: replay}):
                assert runs_in_place(moe, 1)
                assert runs_without_host_sync(moe, 17)
                replay.is_recording = True
                assert not runs_in_place(moe, 1)
                assert not runs_without_host_sync(moe, 17)
                replay.is_recording, replay.target_TK = False, torch.zeros(1, 2, dtype=torch.long)
                assert not runs_in_place(moe, 1)
            assert runs_in_place(moe, 1)
