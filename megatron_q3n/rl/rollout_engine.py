"""Who answers prompts: the protocol of an engine, and the engine that is the model being trained.

An engine is asked for a whole rollout at once and tells which weights answered. How often it fails and how
it is told of new weights is its own affair.

The in-process engine has no copy of the weights, so it is never stale. Each data-parallel rank answers its
share of the prompts; the answers are then the same on every rank. An answer's random numbers depend on the
run's seed, its prompt's number and its own, and not on the layout or what else is in the rollout: after a
kill the same prompts get the same answers.

Shapes: L layers with experts, K experts per token.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from megatron_q3n.config.rl import RolloutConfig
from megatron_q3n.inference.engine import Engine
from megatron_q3n.inference.request import Abilities
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.inference.sequence import Sequence
from megatron_q3n.model.decode.forward import generating
from megatron_q3n.model.moe.routing_replay import RouteTape
from megatron_q3n.parallel import Parallel
from megatron_q3n.rl.policy_pass import taped
from megatron_q3n.rl.samples import Prompt, Sample

PREFILL_TOKENS = 4096


class RolloutEngine(Protocol):
    """What the loop needs of an engine. Collective calls: every rank makes them."""

    def answer(self, prompts: list[Prompt], samples_per_prompt: int) -> list[Sample]:
        """Return every prompt's samples, prompt by prompt, on every rank."""

    def answer_greedily(self, prompts: list[Prompt]) -> list[Sample]:
        """Return the likeliest answer to each prompt, on every rank."""

    def new_weights(self, version: int) -> None:
        """Answer with the weights of this optimizer step from now on."""


class InProcessEngine:
    """Generates with the model being trained."""

    def __init__(
        self,
        model: Any,
        group: Parallel,
        settings: RolloutConfig,
        stop_tokens: frozenset[int],
        vocab_size: int,
        seed: int,
        *,
        records_routes: bool,
        alive: Callable[[], object] = lambda: None,
    ) -> None:
        """`alive` is called after every pass."""
        self._alive = alive
        self._model, self._group, self._settings = model, group, settings
        self._stop_tokens, self._vocab_size, self._seed = stop_tokens, vocab_size, seed
        self._records_routes = records_routes
        self._version = 0

    def answer(self, prompts: list[Prompt], samples_per_prompt: int) -> list[Sample]:
        """Return every prompt's samples."""
        asked = [(p, member) for p in prompts for member in range(samples_per_prompt)]
        return self._all(asked, self._settings.temperature, records_routes=self._records_routes)

    def answer_greedily(self, prompts: list[Prompt]) -> list[Sample]:
        """Return the likeliest answer to each prompt."""
        return self._all([(p, 0) for p in prompts], 0.0, records_routes=False)

    def new_weights(self, version: int) -> None:
        """Take note: the weights are the same tensors."""
        self._version = version

    def _all(self, asked: list[tuple[Prompt, int]], temperature: float, *, records_routes: bool) -> list[Sample]:
        rank, size = self._group.data_rank, self._group.data_size
        mine = self._own(asked[rank::size], temperature, records_routes)
        shares: list[Any] = [None] * size
        torch.distributed.all_gather_object(shares, mine, group=self._group.groups.dp)
        samples = [sample for share in shares for sample in share]
        return sorted(samples, key=lambda sample: sample.name)

    def _own(self, asked: list[tuple[Prompt, int]], temperature: float, records_routes: bool) -> list[Sample]:
        sampling = Sampling(
            self._settings.max_new_tokens, temperature, stop_tokens=self._stop_tokens, vocab_size=self._vocab_size
        )
        prompts = [prompt.tokens for prompt, _ in asked]
        Abilities.of(self._model).check(prompts, sampling, 0)
        sequences = [
            Sequence(index, p.tokens, f"{self._seed}.{self._version}.{p.number}.{member}", sampling, 0)
            for index, (p, member) in enumerate(asked)
        ]
        with generating(self._model), taped([self._model], recording=records_routes) as tapes:
            engine = Engine(
                self._model,
                sequences,
                sampling,
                draft_depth=0,
                prefill_tokens=PREFILL_TOKENS,
                max_sequences=self._settings.max_sequences or max(1, len(sequences)),
            )
            routes = recorded_routes(engine, tapes if records_routes else {}, self._alive)
        return [
            _sample(prompt, member, sequence, self._version, routes.get(sequence.index))
            for (prompt, member), sequence in zip(asked, sequences)
        ]


def recorded_routes(
    engine: Engine, tapes: dict[int, RouteTape], alive: Callable[[], object]
) -> dict[int, list[np.ndarray]]:
    """Generate to the end, and keep which experts each token went to; no tapes keep nothing.

    Returns: for each sequence the arrays [tokens, L, K] of the passes it was in, in order.
    """
    routes: dict[int, list[np.ndarray]] = {}
    while engine.is_busy():
        engine.step()
        taken = [tapes[number].take()[1] for number in sorted(tapes)]
        if taken and engine.last_pass:  # else an idle rank's pass over a dummy token, for others
            for (sequence, _), part in zip(engine.last_pass, _by_sequence(engine, taken)):
                routes.setdefault(sequence.index, []).append(part)
        alive()
    return routes


def _by_sequence(engine: Engine, taken: list[list[torch.Tensor]]) -> list[np.ndarray]:
    """Cut what the layers used in one pass into its sequences' parts, uint16 [tokens, L, K]."""
    assert all(len(passes) == 1 for passes in taken), "one pass of the trunk per step"
    routes_SLK = torch.stack([passes[0] for passes in taken], 1).to(torch.int16).cpu().numpy()
    counts = [count for _, count in engine.last_pass]
    if len(set(counts)) == 1:  # the layers saw a batch [tokens, sequences]; see Span.arrange
        by_token = routes_SLK.reshape(counts[0], len(counts), *routes_SLK.shape[1:])
        routes_SLK = np.concatenate(list(by_token.swapaxes(0, 1)))
    return [part.astype(np.uint16) for part in np.split(routes_SLK, np.cumsum(counts)[:-1])]


def _sample(prompt: Prompt, member: int, sequence: Sequence, version: int, routes: list[np.ndarray] | None) -> Sample:
    done = sequence.completion
    assert done.finish_reason is not None
    known = None if routes is None else np.concatenate(routes)
    assert known is None or len(known) == len(prompt.tokens) + len(done.tokens) - 1
    return Sample(prompt, member, done.tokens, done.sampled_logprobs, done.finish_reason, version, known)
