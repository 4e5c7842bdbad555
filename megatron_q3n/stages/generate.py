"""Text from a checkpoint, as it comes: prompts from the configuration, completions to the terminal or a file."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_q3n import parallel
from megatron_q3n.checkpoint.reader import gathered
from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.config.inference import InferenceConfig
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.device import choose_device
from megatron_q3n.inference.generate import start
from megatron_q3n.inference.request import Abilities
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.inference.sequence import Completion, acceptance, mean_accepted_length
from megatron_q3n.inference.text import TextPieces
from megatron_q3n.parallel import Parallel
from megatron_q3n.stages import trained_model


def run(config: RunConfig, _run_dir: Path) -> int:
    """Generate and print. Leaves no run directory: `runs/latest` stays what was trained.

    Returns: 0.
    """
    if not config.inference.prompts:
        raise UserError(
            "inference.prompts is empty: give at least one text to continue, e.g. "
            """'inference.prompts=["def "]'."""
        )
    source = trained_model.find(config)
    config = trained_model.with_model_of(source, config)
    wanted = config.inference
    tokenizer = trained_model.tokenizer_of(source, wanted.tokenizer)
    sampling, prompts = sampling_of(wanted, tokenizer), encoded(wanted, tokenizer)
    Abilities.configured(config).check(prompts, sampling, wanted.draft_depth)
    device = choose_device(config)
    group = parallel.initialize(config, device)
    model = trained_model.load_model(source, config, device, group)
    # each replica takes a share of the prompts
    mine = range(len(prompts))[group.data_rank :: group.data_size]
    began = time.monotonic()
    generation = start(
        model,
        [prompts[i] for i in mine],
        sampling,
        seed=[f"{wanted.seed}.{i}" for i in mine],
        draft_depth=wanted.draft_depth,
        prefill_tokens=wanted.prefill_tokens,
        max_sequences=wanted.max_sequences,
        cuda_graph=wanted.cuda_graph,
    )
    live = group.is_leader and len(prompts) == 1
    if live:
        print(wanted.prompts[0], end="", flush=True)
    text = TextPieces(tokenizer, sampling.stop_tokens)
    for piece in generation:
        if live:
            print(text.add(piece.tokens), end="", flush=True)
    seconds = time.monotonic() - began
    completions = _collected(group, dict(zip(mine, generation.completions)))
    if group.is_leader:
        if live:
            print(text.rest())
        _report(wanted, tokenizer, sampling, completions, seconds, shown=live)
        if device.torch_device.type == "cuda" and generation.without_graphs:
            print(f"steps were not CUDA graphs: {generation.without_graphs}", file=sys.stderr)
    parallel.shutdown()
    return 0


def sampling_of(wanted: InferenceConfig, tokenizer: TextTokenizer) -> Sampling:
    """Return how to draw; a document's end always stops.

    Raises: UserError for a stop token that the tokenizer does not have.
    """
    stops = {tokenizer.eod, *(_stop_token(stop, tokenizer) for stop in wanted.stop)}
    return Sampling(
        wanted.max_new_tokens, wanted.temperature, wanted.top_k, wanted.top_p, frozenset(stops), tokenizer.vocab_size
    )


def encoded(wanted: InferenceConfig, tokenizer: TextTokenizer) -> list[list[int]]:
    """Return the prompts' token ids."""
    return [tokenizer.encode(prompt) for prompt in wanted.prompts]


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


def _collected(group: Parallel, mine: dict[int, Completion]) -> list[Completion]:
    """Return every replica's completions in the order of the prompts. A collective call."""
    found = dict(item for share in gathered(group, mine) for item in share.items())
    return [found[index] for index in sorted(found)]


def _report(
    wanted: InferenceConfig,
    tokenizer: TextTokenizer,
    sampling: Sampling,
    completions: list[Completion],
    seconds: float,
    *,
    shown: bool,
) -> None:
    """Print texts that were not shown as they came, write the file, and say how fast it was."""
    results = list(_results(wanted, tokenizer, sampling, completions))
    if wanted.output is not None:
        lines = "".join(json.dumps(result) + "\n" for result in results)
        try:
            Path(wanted.output).write_text(lines, encoding="utf-8")
        except OSError as error:
            raise UserError(f"inference.output={wanted.output}: {error}") from None
    elif not shown:
        for number, result in enumerate(results, 1):
            print(f"--- {number}, {result['finish_reason']}\n{result['prompt']}{result['text']}")
    tokens = sum(len(done.tokens) for done in completions)
    line = f"{tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s"
    if wanted.draft_depth:
        shares = ", ".join(f"{kept}/{drafted}" for drafted, kept in acceptance(completions))
        line += f"; {mean_accepted_length(completions):.2f} tokens per pass, drafts kept by depth: {shares}"
    print(line, file=sys.stderr)


def _results(
    wanted: InferenceConfig, tokenizer: TextTokenizer, sampling: Sampling, completions: list[Completion]
) -> Iterator[dict[str, Any]]:
    for prompt, done in zip(wanted.prompts, completions):
        text = TextPieces(tokenizer, sampling.stop_tokens)
        yield {"prompt": prompt, "text": text.add(done.tokens) + text.rest(), **asdict(done)}
