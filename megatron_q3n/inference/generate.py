"""Public interface of text generation: `generate` for finished completions, `start` for a stream of tokens."""

from collections.abc import Iterator
from typing import Any

from megatron_q3n.inference.engine import Engine
from megatron_q3n.inference.limits import GenerationLimits
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.inference.sequence import Completion, Sequence, TokenChunk
from megatron_q3n.model.decode.forward import generating
from megatron_q3n.model.decode.protocols import DecodeModel

PREFILL_TOKENS = 4096
Seed = int | list[int] | list[str]


class Generation:
    """Iterator over new tokens; `completions`, in the order of the prompts, grow with it.

    The model is in evaluation mode from the first token until the iterator is exhausted or closed.
    """

    def __init__(self, model: DecodeModel, sequences: list[Sequence], engine: Engine) -> None:
        self._model, self._sequences, self._engine = model, sequences, engine

    def __iter__(self) -> Iterator[TokenChunk]:
        with generating(self._model):
            while self._engine.is_busy():
                yield from self._engine.step()

    @property
    def cuda_graph_obstacle(self) -> str | None:
        """Why decode steps are not CUDA graphs; None where they are."""
        return self._engine.graphs.obstacle

    @property
    def launches(self) -> int | None:
        """Kernel launches that the CUDA graph of a decode step replaces; None without graphs."""
        return self._engine.graphs.num_launches

    @property
    def completions(self) -> list[Completion]:
        """The completions so far."""
        return [sequence.completion for sequence in self._sequences]


def generate(model: DecodeModel, prompts: list[list[int]], sampling: Sampling, **options: Any) -> list[Completion]:
    """Complete each prompt; options and errors as `start`.

    Returns: completions in the order of the prompts.
    """
    generation = start(model, prompts, sampling, **options)
    for _ in generation:
        pass
    return generation.completions


def start(
    model: DecodeModel,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    seed: Seed = 0,
    draft_depth: int = 0,
    prefill_tokens: int = PREFILL_TOKENS,
    max_sequences: int | None = None,
    cuda_graph: bool | None = False,
) -> Generation:
    """Prepare the completion of each prompt; iterate over the result for tokens as they are generated.

    A sequence's random numbers depend only on the seed and its index among the prompts, or on its entry in a list of
    seeds; not on the batch or the parallel layout. `draft_depth` tokens are drafted by the MTP layer and verified in
    one pass (speculative decoding): the distribution of the output does not change, nor does the output when greedy.
    `prefill_tokens` bounds the prompt tokens of one pass (chunked prefill), `max_sequences` the running batch; further
    prompts wait. `cuda_graph` replays decode steps as CUDA graphs: True requires it, None does where possible. The
    graphs' buffers stay allocated for later calls until `decode_graph.free_graphs(model)`.

    All ranks of a tensor-parallel group pass the same prompts. Data-parallel ranks pass their own; if they share
    experts, all of them must iterate, including those without prompts.

    Raises: UserError for an empty or too long prompt, an unknown token, drafts without an MTP layer, an unsupported
        parallel layout, or required graphs that are not possible.
    """
    GenerationLimits.from_model(model).check(prompts, sampling, draft_depth)
    assert prefill_tokens > 0
    assert max_sequences is None or max_sequences > 0
    seeds = [f"{seed}.{i}" for i in range(len(prompts))] if isinstance(seed, int) else seed
    sequences = [
        Sequence(index, prompt, str(sequence_seed), sampling, draft_depth)
        for index, (prompt, sequence_seed) in enumerate(zip(prompts, seeds, strict=True))
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
