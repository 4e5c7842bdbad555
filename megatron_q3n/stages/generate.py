"""Generate stage: completions of the configured prompts by a checkpoint, streamed to the terminal or to a file."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_q3n import parallel
from megatron_q3n.checkpoint.reader import gather_objects
from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.config.inference import InferenceConfig
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.device import select_device
from megatron_q3n.inference.detokenizer import IncrementalDetokenizer
from megatron_q3n.inference.generate import Generation, start
from megatron_q3n.inference.limits import GenerationLimits
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.inference.sequence import Completion, acceptance, mean_acceptance_length
from megatron_q3n.model.decode.protocols import DecodeModel
from megatron_q3n.parallel import Parallel
from megatron_q3n.stages import trained_model


def run(config: RunConfig, _run_dir: Path) -> int:
    """Generate and print. There is no run directory, so `runs/latest` stays the last training run.

    Returns: 0.
    """
    if not config.inference.prompts:
        raise UserError(
            "inference.prompts is empty: set at least one text to continue, e.g. "
            """'inference.prompts=["def "]'."""
        )
    source = trained_model.find_checkpoint(config)
    config = trained_model.with_checkpoint_model(source, config)
    settings = config.inference
    tokenizer = trained_model.checkpoint_tokenizer(source, settings.tokenizer)
    sampling, prompts = to_sampling(settings, tokenizer), encode_prompts(settings, tokenizer)
    GenerationLimits.from_config(config).check(prompts, sampling, settings.draft_depth)
    device = select_device(config)
    group = parallel.initialize(config, device)
    model = trained_model.load_model(source, config, device, group)
    # each data-parallel replica generates for a share of the prompts
    local = range(len(prompts))[group.data_rank :: group.data_size]
    is_streamed = group.is_leader and len(prompts) == 1
    began = time.monotonic()
    generation = _start(model, settings, sampling, {i: prompts[i] for i in local})
    _run_to_end(generation, settings.prompts[0], tokenizer, sampling, is_streamed=is_streamed)
    seconds = time.monotonic() - began
    completions = _gather_completions(group, dict(zip(local, generation.completions)))
    if group.is_leader:
        _report(settings, tokenizer, sampling, completions, seconds, is_streamed=is_streamed)
        if device.torch_device.type == "cuda" and generation.cuda_graph_obstacle:
            print(f"steps were not CUDA graphs: {generation.cuda_graph_obstacle}", file=sys.stderr)
    parallel.shutdown()
    return 0


def _start(
    model: DecodeModel, settings: InferenceConfig, sampling: Sampling, prompts: dict[int, list[int]]
) -> Generation:
    """Start the generation of the prompts, given by their indices."""
    return start(
        model,
        list(prompts.values()),
        sampling,
        seed=[f"{settings.seed}.{i}" for i in prompts],
        draft_depth=settings.draft_depth,
        prefill_tokens=settings.prefill_tokens,
        max_sequences=settings.max_sequences,
        cuda_graph=settings.cuda_graph,
    )


def _run_to_end(
    generation: Generation, prompt: str, tokenizer: TextTokenizer, sampling: Sampling, *, is_streamed: bool
) -> None:
    """Run the generation; with `is_streamed` print the prompt and each piece of its completion."""
    if not is_streamed:
        for _ in generation:
            pass
        return
    print(prompt, end="", flush=True)
    text = IncrementalDetokenizer(tokenizer, sampling.stop_tokens)
    for piece in generation:
        print(text.add(piece.tokens), end="", flush=True)
    print(text.flush())


def to_sampling(settings: InferenceConfig, tokenizer: TextTokenizer) -> Sampling:
    """Return the sampling settings; the end-of-document token is always a stop token.

    Raises: UserError for a stop token that the tokenizer does not have.
    """
    stops = {tokenizer.eod, *(_stop_token(stop, tokenizer) for stop in settings.stop)}
    return Sampling(
        settings.max_new_tokens,
        settings.temperature,
        settings.top_k,
        settings.top_p,
        frozenset(stops),
        tokenizer.vocab_size,
    )


def encode_prompts(settings: InferenceConfig, tokenizer: TextTokenizer) -> list[list[int]]:
    """Return the prompts' token ids."""
    return [tokenizer.encode(prompt) for prompt in settings.prompts]


def _stop_token(stop: str | int, tokenizer: TextTokenizer) -> int:
    if isinstance(stop, int):
        if not 0 <= stop < tokenizer.vocab_size:
            raise UserError(f"inference.stop: there is no token {stop}; ids go from 0 to {tokenizer.vocab_size - 1}.")
        return stop
    special = tokenizer.id_of(stop)
    if special is not None:
        return special
    ids = tokenizer.encode(stop)
    if len(ids) != 1:
        raise UserError(
            f"inference.stop: {stop!r} is not one token of this tokenizer but {len(ids)} ({ids}); "
            "a stop token must be one, given by its text, its name or its id."
        )
    return ids[0]


def _gather_completions(group: Parallel, local: dict[int, Completion]) -> list[Completion]:
    """Return every replica's completions in the order of the prompts. A collective call."""
    by_index = dict(item for shard in gather_objects(group, local) for item in shard.items())
    return [by_index[index] for index in sorted(by_index)]


def _report(
    settings: InferenceConfig,
    tokenizer: TextTokenizer,
    sampling: Sampling,
    completions: list[Completion],
    seconds: float,
    *,
    is_streamed: bool,
) -> None:
    """Write the output file or print texts that were not streamed, and print the throughput."""
    results = list(_results(settings, tokenizer, sampling, completions))
    if settings.output is not None:
        lines = "".join(json.dumps(result) + "\n" for result in results)
        try:
            Path(settings.output).write_text(lines, encoding="utf-8")
        except OSError as error:
            raise UserError(f"inference.output={settings.output}: {error}") from None
    elif not is_streamed:
        for number, result in enumerate(results, 1):
            print(f"--- {number}, {result['finish_reason']}\n{result['prompt']}{result['text']}")
    tokens = sum(len(completion.tokens) for completion in completions)
    line = f"{tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s"
    if settings.draft_depth:
        shares = ", ".join(f"{kept}/{drafted}" for drafted, kept in acceptance(completions))
        line += f"; {mean_acceptance_length(completions):.2f} tokens per pass, drafts accepted by depth: {shares}"
    print(line, file=sys.stderr)


def _results(
    settings: InferenceConfig, tokenizer: TextTokenizer, sampling: Sampling, completions: list[Completion]
) -> Iterator[dict[str, Any]]:
    for prompt, completion in zip(settings.prompts, completions):
        text = IncrementalDetokenizer(tokenizer, sampling.stop_tokens)
        yield {"prompt": prompt, "text": text.add(completion.tokens) + text.flush(), **asdict(completion)}
