#!/usr/bin/env python
"""Measure generation with a trained model: time per token by context length and layer, and what drafts gain.

tools/benchmarks/bench_generate.py runs/latest --precision bf16 --depths 0 1 2 3 4 --json figures.json

On a GPU, steps are timed both as CUDA graphs and launched one by one; the speed-up of drafts is against
no drafts, both as graphs. Texts are compared with those without drafts: in fp32 they are the same, in bf16
a near tie may fall the other way, and `tie` says how near in log probability the nearest was. With --profile, where
a round's time goes on the device, by kernel.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megatron_q3n.config import EXIT_BAD_INPUT, RunConfig, UserError, validate
from megatron_q3n.recipe import configure, register_defaults

STEPS, REPEATS = 10, 5
PROFILED, WARM, SHOWN = 20, 4, 16  # rounds, rounds before them, kernels
ROOM = (REPEATS + 1) * STEPS  # positions that timing takes


def main() -> int:
    """Measure, print the tables, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", metavar="RUN_DIR", help="a run directory, or a checkpoint in one")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--depths", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--prompts", type=int, default=8, help="rows of held-out text to continue")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="new tokens per prompt")
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.0, 1.0])
    parser.add_argument("--sequences", type=int, default=1, help="sequences at once")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--profile", action="store_true", help="kernels of greedy rounds")
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
    register_defaults()
    config = configure(["--config-name", "generate", "checkpoint.load=?", f"precision={given.precision}"])
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
        "drafts": drafts(model, given, source),
        "profiles": profiles(model, given, source) if given.profile else {},
    }
    parallel.shutdown()
    return figures


def contexts(model: Any, given: argparse.Namespace, synchronize: Callable[[], None]) -> list[dict[str, Any]]:
    """Time one token of every sequence behind a context of each length, filled with noise."""
    import torch

    from megatron_q3n.model.decode.forward import generating

    if not given.contexts:
        return []
    print("\ncontext   ms a token   as a graph   of it: Gated DeltaNet   attention   experts")
    rows: list[dict[str, Any]] = []
    for context in given.contexts:
        with generating(model), torch.no_grad():
            launched = timed(step(model, noise(model, given.sequences, context), False), synchronize)
            graph = None
            if torch.cuda.is_available():
                graph = timed(step(model, noise(model, given.sequences, context), None), synchronize)
            kinds = by_kind(model, noise(model, given.sequences, context), synchronize)
        rows.append({"context": context, "launched": launched, "graph": graph, **kinds})
        print(
            f"{context:7d} {launched:12.3f} {'–' if graph is None else f'{graph:.3f}':>12} "
            f"{kinds['gated_delta_net']:23.3f} {kinds['attention']:11.3f} {kinds['experts']:9.3f}"
        )
    whole = "launched" if rows[0]["graph"] is None else "graph"
    delta, token = (rows[-1][name] / rows[0][name] - 1 for name in ("gated_delta_net", whole))
    print(f"from {rows[0]['context']} to {rows[-1]['context']}: Gated DeltaNet {delta:+.1%}, a token {token:+.1%}")
    return rows


def noise(model: Any, sequences: int, context: int) -> Any:
    """Return the state of sequences of this length that read noise."""
    from megatron_q3n.model.decode.state import DecodeState, KeyValueCache

    state = DecodeState.empty(model, sequences)
    for memory in state.layers:
        if isinstance(memory, KeyValueCache):
            memory.resize(context + ROOM)
            memory.key.normal_()
            memory.value.normal_()
    state.lengths = [context] * sequences
    return state


def step(model: Any, state: Any, cuda_graph: bool | None) -> Callable[[], None]:
    """Return what makes a token of every sequence greedily and waits for it."""
    from megatron_q3n.inference.decode_graph import RoundGraphs
    from megatron_q3n.inference.decode_step import Rounds
    from megatron_q3n.inference.passes import Passes
    from megatron_q3n.inference.sampling import Sampling

    rounds = Rounds(Passes(model, 0), Sampling(1, 0.0), 0)
    graphs, longest, rows = (RoundGraphs(rounds, cuda_graph), state.lengths[0] + ROOM, len(state.lengths))
    none = rounds.passes.numbers([[]] * rows)
    running = rounds.begin(state, rounds.passes.tokens([1] * rows), none, none)

    def make() -> None:
        nonlocal running
        running, packed = graphs.take_on(running, none, longest)
        packed.tolist()
        running.state.count([1] * rows)

    return make


def by_kind(model: Any, state: Any, synchronize: Callable[[], None]) -> dict[str, float]:
    """Time all layers of one kind after the other, without the rest; on a GPU as a graph."""
    import torch

    from megatron_q3n.model.decode.forward import rotary_of, run_layer
    from megatron_q3n.model.decode.span import Span
    from megatron_q3n.model.decode.state import KeyValueCache

    num = len(state.lengths)
    device = next(model.parameters()).device
    span = Span.at(torch.tensor(state.lengths, device=device), 1, state.lengths[0] + 1)
    rotary = rotary_of(model, span, state)
    weight = model.decoder.final_norm.weight
    hidden = torch.randn(1, num, len(weight), device=device).to(weight.dtype)
    kinds: dict[str, list[Any]] = {"gated_delta_net": [], "attention": [], "experts": []}
    for layer, memory in zip(model.decoder.layers, state.layers):
        name = "experts" if memory is None else "gated_delta_net"
        kinds["attention" if isinstance(memory, KeyValueCache) else name].append((layer, memory))

    def run(layers: list[Any]) -> None:
        for layer, memory in layers:
            run_layer(layer, hidden, memory, span, rotary, False)

    return {name: timed(replayed(partial(run, layers)), synchronize) for name, layers in kinds.items()}


def replayed(work: Callable[[], None]) -> Callable[[], None]:
    """Return the work as a CUDA graph; without a GPU, as it is."""
    import torch

    if not torch.cuda.is_available():
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


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


def drafts(model: Any, given: argparse.Namespace, source: Path) -> list[dict[str, Any]]:
    """Continue held-out text at each draft depth, greedily and sampled, and compare with no drafts."""
    import torch

    prompts = held_out(source, given)
    print(
        "\ntemperature   depth   graph   launches   ms a token   tokens/s   speed-up   tokens per pass   same texts"
        "      tie   accepted by depth"
    )
    rows = []
    for temperature in given.temperatures:
        plain: list[Any] = []
        modes = [(0, False)] if torch.cuda.is_available() else []
        for depth, cuda_graph in [*modes, *((depth, None) for depth in given.depths)]:
            done, figures = continued(model, prompts, given, temperature, depth, cuda_graph)
            if not plain and cuda_graph is None:
                plain = [figures["ms_per_token"], done]
            row = {"temperature": temperature, "depth": depth, **figures}
            if plain:
                row["speed_up"] = plain[0] / figures["ms_per_token"]
            if plain and not temperature:
                row |= compared(done, plain[1])
            rows.append(row)
            show(row, len(prompts))
    return rows


def continued(
    model: Any,
    prompts: list[list[int]],
    given: argparse.Namespace,
    temperature: float,
    depth: int,
    cuda_graph: bool | None,
) -> tuple[list[Any], dict[str, Any]]:
    """Continue the prompts, so many at once, and time what comes after their first tokens."""
    from megatron_q3n.inference.generate import start
    from megatron_q3n.inference.sampling import Sampling
    from megatron_q3n.inference.sequence import acceptance, mean_accepted_length

    sampling = Sampling(given.tokens, temperature)
    if cuda_graph is False:  # to say how much graphs gain, a few prompts will do
        prompts, sampling = prompts[: given.sequences], Sampling(given.tokens // 4, temperature)
    done: list[Any] = []
    seconds = tokens = 0.0
    # the first group twice: once to warm up and to capture
    groups = [prompts[i : i + given.sequences] for i in range(0, len(prompts), given.sequences)]
    for number, group in enumerate([groups[0], *groups]):
        seeds = [f"{number}.{i}" for i in range(len(group))]
        generation = start(model, group, sampling, seed=seeds, draft_depth=depth, cuda_graph=cuda_graph)
        coming = iter(generation)
        first = sum(len(next(coming).tokens) for _ in group)
        began = time.perf_counter()
        rest = sum(len(piece.tokens) for piece in coming)  # each piece waits for the device
        if number:
            seconds, tokens = seconds + time.perf_counter() - began, tokens + rest
            done += generation.completions
        assert first == len(group)
    figures = {
        "graph": generation.without_graphs is None,
        "without_graphs": generation.without_graphs,
        "launches": generation.launches,
        "ms_per_token": 1e3 * seconds / tokens,
        "tokens_per_second": tokens / seconds,
        "tokens_per_pass": mean_accepted_length(done) if depth else 1.0,
        "conditional_acceptance": [kept / max(1, n) for n, kept in acceptance(done)],
    }
    return done, figures


def profiles(model: Any, given: argparse.Namespace, source: Path) -> dict[str, Any]:
    """Look at the kernels of some greedy rounds behind one prompt, at each draft depth."""
    import torch

    from megatron_q3n.inference.generate import start
    from megatron_q3n.inference.sampling import Sampling
    from tools.benchmarks.comparison.kernel_groups import profiled

    prompt, found = held_out(source, given)[0], {}
    for depth in given.depths:
        sampling = Sampling((PROFILED + WARM + 1) * (depth + 1), 0.0)
        coming = iter(start(model, [prompt], sampling, draft_depth=depth, cuda_graph=None))
        for _ in range(WARM):
            next(coming)
        seen = profiled(partial(next, coming), PROFILED, is_cuda=torch.cuda.is_available())
        found[str(depth)] = dataclasses.asdict(seen)
        print(f"\na round at depth {depth}: {seen.busy_ms:.3f} ms busy, {seen.kernels:.0f} kernels")
        for name, milliseconds, count in seen.longest[:SHOWN]:
            print(f"{1e3 * milliseconds:9.1f} µs {count:6.1f} ×   {name[:90]}", flush=True)
    return found


def compared(done: list[Any], plain: list[Any]) -> dict[str, Any]:
    """Say how many texts are the plain ones, and where not, how far apart the two choices are at the first difference.

    Both were their pass's likeliest: the log probabilities differ by rounding alone if it was a near tie.
    """
    gaps = []
    for a, b in zip(done, plain):
        first = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y), None)
        if first is not None:
            gaps.append(abs(a.logprobs[first] - b.logprobs[first]))
    return {"same_texts": len(done) - len(gaps), "largest_gap": max(gaps, default=0.0)}


def show(row: dict[str, Any], num_prompts: int) -> None:
    """Print a line of the table."""
    shares = " ".join(f"{share:.2f}" for share in row["conditional_acceptance"])
    same = f"{row['same_texts']:3d} of {num_prompts:3d}" if "same_texts" in row else ""
    gap = f"{row['largest_gap']:.3f}" if row.get("largest_gap") else ""
    speed_up = f"{row['speed_up']:.2f}" if "speed_up" in row else ""
    print(
        f"{row['temperature']:11.1f} {row['depth']:7d} {'yes' if row['graph'] else 'no':>7} "
        f"{row['launches'] or '':>10} {row['ms_per_token']:12.3f} {row['tokens_per_second']:10.1f} {speed_up:>10} "
        f"{row['tokens_per_pass']:17.2f} {same:>12} {gap:>8}   {shares}",
        flush=True,
    )


def held_out(source: Path, given: argparse.Namespace) -> list[list[int]]:
    """Return the beginnings of the first held-out rows of the run that trained the model."""
    from megatron_q3n.data.pretrain import build_pretrain_data
    from megatron_q3n.run_directory import CONFIG

    path = source.parent.parent / CONFIG
    if not path.is_file():
        raise UserError(f"{source} lies in no run directory, whose held-out text is continued here.")
    config: RunConfig = validate(yaml.safe_load(path.read_text()))
    data = build_pretrain_data(config, is_leader=True, barrier=lambda: None)
    rows = list(itertools.islice(data.validation_sample_tokens(), given.prompts))
    if len(rows) < given.prompts:
        raise UserError(f"--prompts {given.prompts}: this run validates on {len(rows)} rows only.")
    return [row[: given.prompt_tokens].tolist() for row in rows]


if __name__ == "__main__":
    sys.exit(main())
