"""Completions of prompts: the calls for people and programs."""

from collections.abc import Iterator
from typing import Any

from megatron_q3n.inference.engine import Engine
from megatron_q3n.inference.request import Abilities
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.inference.sequence import Completion, Piece, Sequence
from megatron_q3n.model.decode.forward import generating

PREFILL_TOKENS = 4096
Seed = int | list[int] | list[str]


class Generation:
    """An iterator over new tokens as they are drawn; `completions`, in the order of the prompts, grow with it.

    The model is in evaluation from the first token until the iterator is exhausted or closed.
    """

    def __init__(self, model: Any, sequences: list[Sequence], engine: Engine) -> None:
        self._model, self._sequences, self._engine = model, sequences, engine

    def __iter__(self) -> Iterator[Piece]:
        with generating(self._model):
            while self._engine.is_busy():
                yield from self._engine.step()

    @property
    def without_graphs(self) -> str | None:
        """Why rounds are not CUDA graphs; None where they are."""
        return self._engine.graphs.obstacle

    @property
    def launches(self) -> int | None:
        """What one CUDA graph of a round replaces; None where rounds are not graphs."""
        return self._engine.graphs.num_launches

    @property
    def completions(self) -> list[Completion]:
        """The completions so far."""
        return [sequence.completion for sequence in self._sequences]


def generate(model: Any, prompts: list[list[int]], sampling: Sampling, **options: Any) -> list[Completion]:
    """Complete each prompt; options and errors as `start`.

    Returns: completions in the order of the prompts.
    """
    generation = start(model, prompts, sampling, **options)
    for _ in generation:
        pass
    return generation.completions


def start(
    model: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    seed: Seed = 0,
    draft_depth: int = 0,
    prefill_tokens: int = PREFILL_TOKENS,
    max_sequences: int | None = None,
    cuda_graph: bool | None = False,
) -> Generation:
    """Prepare to complete each prompt; iterate over the result for tokens as they come.

    A sequence's random numbers depend on the seed and its place among the prompts, or on its own
    seed where there is a list of them, and not on what else is in the batch or on the layout.
    `draft_depth` tokens are drafted by the MTP layer and verified together: the outcome has the same
    distribution, and is the same when greedy. `prefill_tokens` is the most that one pass reads of
    prompts, `max_sequences` the most sequences that run at once; others wait. `cuda_graph` replays rounds
    as CUDA graphs: True must, None does where it can; their buffers stay with the model for later calls
    until `round_graph.forget(model)`.

    Every rank of a tensor-parallel group gives the same prompts. Data-parallel ranks give their own;
    if they share experts, all must iterate, those without prompts too.

    Raises: UserError for an empty or too long prompt, an unknown token, drafts without MTP, or a
        layout that generation does not know, or graphs that must be and cannot.
    """
    Abilities.of(model).check(prompts, sampling, draft_depth)
    assert prefill_tokens > 0
    assert max_sequences is None or max_sequences > 0
    own = [f"{seed}.{i}" for i in range(len(prompts))] if isinstance(seed, int) else seed
    sequences = [
        Sequence(index, prompt, str(stream), sampling, draft_depth)
        for index, (prompt, stream) in enumerate(zip(prompts, own, strict=True))
    ]
    engine = Engine(
        model,
        sequences,
        sampling,
        draft_depth=draft_depth,
        prefill_tokens=prefill_tokens,
        max_sequences=max_sequences or max(1, len(sequences)),
        cuda_graph=cuda_graph,
    )
    return Generation(model, sequences, engine)
