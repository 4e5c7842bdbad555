#!/usr/bin/env python
"""Measure generation with a trained model: time per token by context length and layer, and what drafts gain.

tools/bench_generate.py runs/latest --contexts 1024 4096 16384 --depths 0 1 2 3
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # works without an installed package

import yaml

from megatron_q3n import train
from megatron_q3n.config import EXIT_BAD_INPUT, RunConfig, UserError, validate

STEPS, REPEATS = 10, 5


def main() -> int:
    """Measure, print two tables, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", metavar="RUN_DIR", help="a run directory, or a checkpoint in one")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--depths", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--prompts", type=int, default=8, help="rows of held-out text to continue")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per prompt")
    parser.add_argument("--sequences", type=int, default=1, help="sequences at once")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    try:
        figures = measure(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))
    return 0


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Load the model, and measure both."""
    train.register_defaults()
    config = train.configure(
        ["--config-name", "generate", "checkpoint.load=?", f"precision={given.precision}"]
    )
    tree = config.model_dump(mode="json")
    tree["checkpoint"]["load"] = given.source
    config = validate(tree)
    # late: torch and megatron-core take seconds, and a wrong argument is told at once
    from megatron_q3n.device import choose_device, quiet_known_warnings

    quiet_known_warnings()
    device = choose_device(config)
    from megatron_q3n import parallel
    from megatron_q3n.stages import trained_model

    group = parallel.initialize(config, device)
    source = trained_model.find(config)
    config = trained_model.with_model_of(source, config)
    model = trained_model.load_model(source, config, device, group)
    where = device.choices["device"].removesuffix(" is there")
    print(f"{source}, {given.precision}, {where}, {given.sequences} sequence(s) at once")
    figures = {
        "source": str(source),
        "device": where,
        "precision": given.precision,
        "sequences": given.sequences,
        "contexts": contexts(model, given, device.synchronize),
        "drafts": drafts(model, given, source, device.synchronize),
    }
    parallel.shutdown()
    return figures


def contexts(
    model: Any, given: argparse.Namespace, synchronize: Callable[[], None]
) -> list[dict[str, float]]:
    """Time one token of every sequence behind a context of each length, filled with noise."""
    import torch

    from megatron_q3n.model.decode import generating
    from megatron_q3n.model.decode_state import DecodeState, KeyValueCache

    print("\ncontext   ms per step   of it: Gated DeltaNet   attention   experts")
    rows = []
    for context in given.contexts:
        state = DecodeState.empty(model, given.sequences)
        for memory in state.layers:
            if isinstance(memory, KeyValueCache):
                memory.resize(context + 64)
                memory.key.normal_()
                memory.value.normal_()
        state.lengths = [context] * given.sequences
        with generating(model), torch.no_grad():
            whole = timed(partial(step, model, state), synchronize)
            times = {"step": whole, **by_kind(model, state, synchronize)}
        rows.append({"context": context, **times})
        print(
            f"{context:7d} {times['step']:13.3f} {times['gated_delta_net']:23.3f} "
            f"{times['attention']:11.3f} {times['experts']:9.3f}"
        )
    return rows


def step(model: Any, state: Any) -> None:
    """Make a token of every sequence greedily, without counting it."""
    import torch

    from megatron_q3n.model.decode import extend, logits_of
    from megatron_q3n.model.decode_state import Span

    device = next(model.parameters()).device
    tokens = torch.ones(len(state.lengths), dtype=torch.long, device=device)
    span = Span(state.lengths, [1] * len(tokens), device)
    logits_of(model, extend(model, tokens, span, state)).argmax(-1).tolist()


def by_kind(model: Any, state: Any, synchronize: Callable[[], None]) -> dict[str, float]:
    """Time all layers of one kind after the other, without the rest."""
    import torch

    from megatron_q3n.model.decode import rotary_of, run_layer
    from megatron_q3n.model.decode_state import KeyValueCache, Span

    num = len(state.lengths)
    device = next(model.parameters()).device
    span = Span(state.lengths, [1] * num, device)
    rotary = rotary_of(model, span)
    weight = model.decoder.final_norm.weight
    hidden = torch.randn(1, num, len(weight), device=device).to(weight.dtype)
    kinds: dict[str, list[Any]] = {"gated_delta_net": [], "attention": [], "experts": []}
    for layer, memory in zip(model.decoder.layers, state.layers):
        name = "experts" if memory is None else "gated_delta_net"
        kinds["attention" if isinstance(memory, KeyValueCache) else name].append((layer, memory))

    def run(layers: list[Any]) -> None:
        for layer, memory in layers:
            run_layer(layer, hidden, memory, span, rotary, False)

    return {name: timed(partial(run, layers), synchronize) for name, layers in kinds.items()}


def timed(work: Callable[[], None], synchronize: Callable[[], None]) -> float:
    """Return the median milliseconds of one call, over repeats of several calls, after a warm-up."""
    found = []
    for _ in range(REPEATS + 1):
        synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            work()
        synchronize()
        found.append((time.perf_counter() - began) * 1e3 / STEPS)
    return statistics.median(found[1:])


def drafts(
    model: Any, given: argparse.Namespace, source: Path, synchronize: Callable[[], None]
) -> list[dict[str, Any]]:
    """Continue held-out text at each draft depth, greedily and sampled, and compare with the first depth."""
    from megatron_q3n.inference.generate import generate
    from megatron_q3n.inference.sampling import Sampling
    from megatron_q3n.inference.sequence import acceptance, mean_accepted_length

    prompts = held_out(source, given)
    print(
        "\ntemperature   depth   tokens/s   speed-up   tokens per pass   same texts   accepted by depth"
    )
    rows = []
    for temperature in (0.0, 1.0):
        first: list[Any] = []
        for depth in given.depths:
            options = {"draft_depth": depth, "max_sequences": given.sequences}
            generate(model, prompts[:1], Sampling(16, temperature), **options)  # warm up
            synchronize()
            began = time.perf_counter()
            done = generate(model, prompts, Sampling(given.tokens, temperature), **options)
            synchronize()
            rate = sum(len(c.tokens) for c in done) / (time.perf_counter() - began)
            first = first or [rate, done]
            row = {
                "temperature": temperature,
                "depth": depth,
                "tokens_per_second": rate,
                "speed_up": rate / first[0],
                "tokens_per_pass": mean_accepted_length(done) if depth else 1.0,
                "same_texts": sum(a.tokens == b.tokens for a, b in zip(done, first[1])),
                "conditional_acceptance": [kept / max(1, n) for n, kept in acceptance(done)],
            }
            rows.append(row)
            shares = " ".join(f"{share:.2f}" for share in row["conditional_acceptance"])
            print(
                f"{temperature:11.1f} {depth:7d} {rate:10.1f} {row['speed_up']:10.2f} "
                f"{row['tokens_per_pass']:17.2f} {row['same_texts']:6d} of {len(prompts):3d}   {shares}"
            )
    return rows


def held_out(source: Path, given: argparse.Namespace) -> list[list[int]]:
    """Return the beginnings of the first held-out rows of the run that trained the model."""
    from megatron_q3n.data.pretrain import build_pretrain_data
    from megatron_q3n.stages.run_directory import CONFIG

    path = source.parent.parent / CONFIG
    if not path.is_file():
        raise UserError(
            f"{source} lies in no run directory, whose held-out text is continued here."
        )
    config: RunConfig = validate(yaml.safe_load(path.read_text()))
    data = build_pretrain_data(config, is_leader=True, barrier=lambda: None)
    rows = list(itertools.islice(data.validation_sample_tokens(), given.prompts))
    if len(rows) < given.prompts:
        raise UserError(f"--prompts {given.prompts}: this run validates on {len(rows)} rows only.")
    return [row[: given.prompt_tokens].tolist() for row in rows]


if __name__ == "__main__":
    sys.exit(main())
