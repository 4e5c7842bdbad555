"""Rollout engines: the protocol, and the in-process engine, which generates with the model being trained.

An engine generates a whole rollout per call and records which weights generated it. Retries and the transfer of new
weights are internal to it.

The in-process engine has no copy of the weights, so it is never stale. Each data-parallel rank generates for its share
of the prompts; afterwards every rank has all samples. A sample's random numbers depend on the run's seed, the version
of the weights, its prompt's number and its index in the group, and not on the layout or the rest of the rollout: after
a kill the same prompts get the same responses.

Shapes: L layers with experts, K experts per token.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from megatron_q3n.config.rl import RolloutConfig
from megatron_q3n.inference.engine import Engine
from megatron_q3n.inference.limits import GenerationLimits
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.inference.sequence import Sequence
from megatron_q3n.model.decode.forward import generating
from megatron_q3n.model.decode.protocols import DecodeModel
from megatron_q3n.model.moe.routing_replay import RoutingReplay
from megatron_q3n.parallel import Parallel
from megatron_q3n.rl.policy_pass import attach_routing_replays
from megatron_q3n.rl.samples import Prompt, Sample

PREFILL_TOKENS = 4096


class RolloutEngine(Protocol):
    """Interface of an engine to the loop. Every method is a collective call."""

    def generate(self, prompts: list[Prompt], samples_per_prompt: int) -> list[Sample]:
        """Return every prompt's samples, prompt by prompt, on every rank."""

    def generate_greedy(self, prompts: list[Prompt]) -> list[Sample]:
        """Return one greedy sample (temperature 0) for each prompt, on every rank."""

    def update_weights(self, version: int) -> None:
        """Generate with the trainer's present weights, those after optimizer step `version`, from here on."""


class InProcessEngine:
    """Rollout engine that generates with the model being trained."""

    def __init__(
        self,
        model: DecodeModel,
        group: Parallel,
        settings: RolloutConfig,
        stop_tokens: frozenset[int],
        vocab_size: int,
        seed: int,
        *,
        records_routes: bool,
        heartbeat: Callable[[], object] = lambda: None,
    ) -> None:
        """Make the engine; `heartbeat` is called after every forward pass."""
        self._heartbeat = heartbeat
        self._model, self._group, self._settings = model, group, settings
        self._stop_tokens, self._vocab_size, self._seed = stop_tokens, vocab_size, seed
        self._records_routes = records_routes
        self._version = 0

    def generate(self, prompts: list[Prompt], samples_per_prompt: int) -> list[Sample]:
        """Return every prompt's samples."""
        requests = [(p, member) for p in prompts for member in range(samples_per_prompt)]
        return self._generate_all(requests, self._settings.temperature, records_routes=self._records_routes)

    def generate_greedy(self, prompts: list[Prompt]) -> list[Sample]:
        """Return one greedy sample for each prompt."""
        return self._generate_all([(p, 0) for p in prompts], 0.0, records_routes=False)

    def update_weights(self, version: int) -> None:
        """Set the version of the weights; the tensors are the trainer's own."""
        self._version = version

    def _generate_all(
        self, requests: list[tuple[Prompt, int]], temperature: float, *, records_routes: bool
    ) -> list[Sample]:
        rank, size = self._group.data_rank, self._group.data_size
        local = self._generate_local(requests[rank::size], temperature, records_routes)
        shards: list[Any] = [None] * size
        torch.distributed.all_gather_object(shards, local, group=self._group.groups.dp)
        samples = [sample for shard in shards for sample in shard]
        return sorted(samples, key=lambda sample: sample.key)

    def _generate_local(
        self, requests: list[tuple[Prompt, int]], temperature: float, records_routes: bool
    ) -> list[Sample]:
        sampling = Sampling(
            self._settings.max_new_tokens, temperature, stop_tokens=self._stop_tokens, vocab_size=self._vocab_size
        )
        prompts = [prompt.tokens for prompt, _ in requests]
        GenerationLimits.from_model(self._model).check(prompts, sampling, 0)
        sequences = [
            Sequence(index, p.tokens, f"{self._seed}.{self._version}.{p.number}.{member}", sampling, 0)
            for index, (p, member) in enumerate(requests)
        ]
        with generating(self._model), attach_routing_replays([self._model], recording=records_routes) as replays:
            engine = Engine(
                self._model,
                sequences,
                sampling,
                draft_depth=0,
                prefill_tokens=PREFILL_TOKENS,
                max_sequences=self._settings.max_sequences or max(1, len(sequences)),
            )
            routes = generate_and_record(engine, replays if records_routes else {}, self._heartbeat)
        return [
            _to_sample(prompt, member, sequence, self._version, routes.get(sequence.index))
            for (prompt, member), sequence in zip(requests, sequences)
        ]


def generate_and_record(
    engine: Engine, replays: dict[int, RoutingReplay], heartbeat: Callable[[], object]
) -> dict[int, list[np.ndarray]]:
    """Run the engine to the end and collect the experts of every token; without replays nothing is collected.

    Returns: for each sequence the arrays uint16 [tokens, L, K] of the passes it was in, in order.
    """
    routes: dict[int, list[np.ndarray]] = {}
    while engine.is_busy():
        engine.step()
        by_layer = [replays[layer].pop_recorded()[1] for layer in sorted(replays)]
        # an idle rank runs a dummy token for the other ranks and has no sequence in its last pass
        if by_layer and engine.last_pass:
            for (sequence, _), part in zip(engine.last_pass, _split_by_sequence(engine, by_layer)):
                routes.setdefault(sequence.index, []).append(part)
        heartbeat()
    return routes


def _split_by_sequence(engine: Engine, by_layer: list[list[torch.Tensor]]) -> list[np.ndarray]:
    """Split the routes of one pass into those of its sequences, uint16 [tokens, L, K] each."""
    assert all(len(passes) == 1 for passes in by_layer), "one forward pass of the main model per step"
    routes_SLK = torch.stack([passes[0] for passes in by_layer], 1).to(torch.int16).cpu().numpy()
    counts = [count for _, count in engine.last_pass]
    # sequences of equal length ran as a batch [tokens, sequences]; see Span.arrange
    if len(set(counts)) == 1:
        by_token = routes_SLK.reshape(counts[0], len(counts), *routes_SLK.shape[1:])
        routes_SLK = np.concatenate(list(by_token.swapaxes(0, 1)))
    return [part.astype(np.uint16) for part in np.split(routes_SLK, np.cumsum(counts)[:-1])]


def _to_sample(
    prompt: Prompt, member: int, sequence: Sequence, version: int, routes: list[np.ndarray] | None
) -> Sample:
    completion = sequence.completion
    assert completion.finish_reason is not None
    routes_SLK = None if routes is None else np.concatenate(routes)
    assert routes_SLK is None or len(routes_SLK) == len(prompt.tokens) + len(completion.tokens) - 1
    return Sample(
        prompt, member, completion.tokens, completion.sampled_logprobs, completion.finish_reason, version, routes_SLK
    )
