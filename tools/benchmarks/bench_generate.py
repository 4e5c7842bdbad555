#!/usr/bin/env python
"""Benchmark of generation with a trained model: time per token by context length and layer, and speed-up by drafts.

tools/benchmarks/bench_generate.py runs/latest --precision bf16 --depths 0 1 2 3 4 --json figures.json

On a GPU, decode steps are timed as CUDA graphs and with single kernel launches; the speed-up of drafts is relative to
no drafts, both as graphs. Texts are compared with those without drafts: in fp32 they are equal, in bf16 a near tie may
be decided differently, and `tie` is the largest difference in log probability at such a tie. --profile prints the time
of a decode step by kernel.
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
# decode steps profiled, decode steps before them, kernels printed
PROFILED, WARMUP, NUM_PRINTED = 20, 4, 16
# tokens that a sequence grows by while it is timed
TIMED_TOKENS = (REPEATS + 1) * STEPS


def main() -> int:
    """Measure, print the tables, and write the figures to the requested file."""
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
    parser.add_argument("--profile", action="store_true", help="kernels of greedy decode steps")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    try:
        figures = measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load the model and measure everything."""
    register_defaults()
    config = configure(["--config-name", "generate", "checkpoint.load=?", f"precision={options.precision}"])
    tree = config.model_dump(mode="json")
    tree["checkpoint"]["load"] = options.source
    config = validate(tree)
    # late: torch and megatron-core take seconds, and a wrong argument must be reported immediately
    from megatron_q3n.device import quiet_known_warnings, select_device

    quiet_known_warnings()
    device = select_device(config)
    from megatron_q3n import parallel
    from megatron_q3n.stages import trained_model

    group = parallel.initialize(config, device)
    source = trained_model.find_checkpoint(config)
    config = trained_model.with_checkpoint_model(source, config)
    model = trained_model.load_model(source, config, device, group)
    device_name = device.backends["device"].removesuffix(" is present")
    print(f"{source}, {options.precision}, {device_name}, {options.sequences} sequence(s) at once")
    figures = {
        "source": str(source),
        "device": device_name,
        "precision": options.precision,
        "sequences": options.sequences,
        "contexts": contexts(model, options, device.synchronize),
        "drafts": drafts(model, options, source),
        "profiles": profiles(model, options, source) if options.profile else {},
    }
    parallel.shutdown()
    return figures


def contexts(model: Any, options: argparse.Namespace, synchronize: Callable[[], None]) -> list[dict[str, Any]]:
    """Time one token of every sequence after a context of each length, filled with noise."""
    import torch

    from megatron_q3n.model.decode.forward import generating

    if not options.contexts:
        return []
    print("\ncontext   ms a token   as a graph   of it: Gated DeltaNet   attention   experts")
    rows: list[dict[str, Any]] = []
    for context in options.contexts:
        with generating(model), torch.no_grad():
            launched = timed(token_step(model, noise_state(model, options.sequences, context), False), synchronize)
            graph = None
            if torch.cuda.is_available():
                graph = timed(token_step(model, noise_state(model, options.sequences, context), None), synchronize)
            kinds = by_kind(model, noise_state(model, options.sequences, context), synchronize)
        rows.append({"context": context, "launched": launched, "graph": graph, **kinds})
        print(
            f"{context:7d} {launched:12.3f} {'–' if graph is None else f'{graph:.3f}':>12} "
            f"{kinds['gated_delta_net']:23.3f} {kinds['attention']:11.3f} {kinds['experts']:9.3f}"
        )
    whole = "launched" if rows[0]["graph"] is None else "graph"
    delta, token = (rows[-1][name] / rows[0][name] - 1 for name in ("gated_delta_net", whole))
    print(f"from {rows[0]['context']} to {rows[-1]['context']}: Gated DeltaNet {delta:+.1%}, a token {token:+.1%}")
    return rows


def noise_state(model: Any, sequences: int, context: int) -> Any:
    """Return the decode state of sequences of this length, with random keys and values."""
    from megatron_q3n.model.decode.state import DecodeState, KVCache

    state = DecodeState.empty(model, sequences)
    for layer_state in state.layers:
        if isinstance(layer_state, KVCache):
            layer_state.resize(context + TIMED_TOKENS)
            layer_state.key.normal_()
            layer_state.value.normal_()
    state.lengths = [context] * sequences
    return state


def token_step(model: Any, state: Any, cuda_graph: bool | None) -> Callable[[], None]:
    """Return a function that generates one token of every sequence greedily and synchronizes."""
    from megatron_q3n.inference.decode_graph import DecodeGraphs
    from megatron_q3n.inference.decode_step import DecodeStep
    from megatron_q3n.inference.model_runner import ModelRunner
    from megatron_q3n.inference.sampling import Sampling

    decode_step = DecodeStep(ModelRunner(model, 0), Sampling(1, 0.0), 0)
    graphs, longest, rows = (DecodeGraphs(decode_step, cuda_graph), state.lengths[0] + TIMED_TOKENS, len(state.lengths))
    none = decode_step.runner.uniform_tensor([[]] * rows)
    parameters = decode_step.parameters([Sampling(1, 0.0)] * rows)
    batch = decode_step.start(state, decode_step.runner.token_tensor([1] * rows), none, none, parameters)

    def generate_token() -> None:
        nonlocal batch
        batch, packed = graphs.run(batch, none, longest)
        packed.tolist()
        batch.state.advance([1] * rows)

    return generate_token


def by_kind(model: Any, state: Any, synchronize: Callable[[], None]) -> dict[str, float]:
    """Time all layers of each kind, one after the other and without the rest of the model; on a GPU as a graph."""
    import torch

    from megatron_q3n.model.decode.forward import rope_for_span, run_layer
    from megatron_q3n.model.decode.span import Span
    from megatron_q3n.model.decode.state import KVCache

    num = len(state.lengths)
    device = next(model.parameters()).device
    span = Span.from_device_starts(torch.tensor(state.lengths, device=device), 1, state.lengths[0] + 1)
    rotary = rope_for_span(model, span, state)
    weight = model.decoder.final_norm.weight
    hidden = torch.randn(1, num, len(weight), device=device).to(weight.dtype)
    kinds: dict[str, list[Any]] = {"gated_delta_net": [], "attention": [], "experts": []}
    for layer, layer_state in zip(model.decoder.layers, state.layers):
        name = "experts" if layer_state is None else "gated_delta_net"
        kinds["attention" if isinstance(layer_state, KVCache) else name].append((layer, layer_state))

    def run(layers: list[Any]) -> None:
        for layer, layer_state in layers:
            run_layer(layer, hidden, layer_state, span, rotary, False)

    return {name: timed(as_graph(partial(run, layers)), synchronize) for name, layers in kinds.items()}


def as_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of the function; without a GPU, the function."""
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
    milliseconds = []
    for _ in range(REPEATS + 1):
        synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            work()
        synchronize()
        milliseconds.append((time.perf_counter() - began) * 1e3 / STEPS)
    return statistics.median(milliseconds[1:])


def drafts(model: Any, options: argparse.Namespace, source: Path) -> list[dict[str, Any]]:
    """Continue held-out text at each draft depth, greedily and sampled, and compare with generation without drafts."""
    import torch

    prompts = held_out(source, options)
    print(
        "\ntemperature   depth   graph   launches   ms a token   tokens/s   speed-up   tokens per pass   same texts"
        "      tie   accepted by depth"
    )
    rows = []
    for temperature in options.temperatures:
        plain: list[Any] = []
        modes = [(0, False)] if torch.cuda.is_available() else []
        for depth, cuda_graph in [*modes, *((depth, None) for depth in options.depths)]:
            done, figures = continued(model, prompts, options, temperature, depth, cuda_graph)
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
    options: argparse.Namespace,
    temperature: float,
    depth: int,
    cuda_graph: bool | None,
) -> tuple[list[Any], dict[str, Any]]:
    """Continue the prompts in groups, and time the tokens after the first of each.

    Returns: completions and figures.
    """
    from megatron_q3n.inference.generate import start
    from megatron_q3n.inference.sampling import Sampling
    from megatron_q3n.inference.sequence import acceptance, mean_acceptance_length

    sampling = Sampling(options.tokens, temperature)
    # for the comparison with graphs a few prompts are enough
    if cuda_graph is False:
        prompts, sampling = prompts[: options.sequences], Sampling(options.tokens // 4, temperature)
    done: list[Any] = []
    seconds = tokens = 0.0
    # the first group twice: the first time warms up and captures
    groups = [prompts[i : i + options.sequences] for i in range(0, len(prompts), options.sequences)]
    for number, group in enumerate([groups[0], *groups]):
        seeds = [f"{number}.{i}" for i in range(len(group))]
        generation = start(model, group, sampling, seed=seeds, draft_depth=depth, cuda_graph=cuda_graph)
        chunks = iter(generation)
        first = sum(len(next(chunks).tokens) for _ in group)
        began = time.perf_counter()
        # each chunk of tokens is synchronized with the device
        rest = sum(len(chunk.tokens) for chunk in chunks)
        if number:
            seconds, tokens = seconds + time.perf_counter() - began, tokens + rest
            done += generation.completions
        assert first == len(group)
    figures = {
        "graph": generation.cuda_graph_obstacle is None,
        "cuda_graph_obstacle": generation.cuda_graph_obstacle,
        "launches": generation.launches,
        "ms_per_token": 1e3 * seconds / tokens,
        "tokens_per_second": tokens / seconds,
        "tokens_per_pass": mean_acceptance_length(done) if depth else 1.0,
        "conditional_acceptance": [accepted / max(1, n) for n, accepted in acceptance(done)],
    }
    return done, figures


def profiles(model: Any, options: argparse.Namespace, source: Path) -> dict[str, Any]:
    """Profile the kernels of greedy decode steps after one prompt, at each draft depth."""
    import torch

    from megatron_q3n.inference.generate import start
    from megatron_q3n.inference.sampling import Sampling
    from tools.benchmarks.comparison.kernel_groups import profiled

    prompt, by_depth = held_out(source, options)[0], {}
    for depth in options.depths:
        sampling = Sampling((PROFILED + WARMUP + 1) * (depth + 1), 0.0)
        chunks = iter(start(model, [prompt], sampling, draft_depth=depth, cuda_graph=None))
        for _ in range(WARMUP):
            next(chunks)
        profile = profiled(partial(next, chunks), PROFILED, is_cuda=torch.cuda.is_available())
        by_depth[str(depth)] = dataclasses.asdict(profile)
        print(f"\na decode step at depth {depth}: {profile.busy_ms:.3f} ms busy, {profile.kernels:.0f} kernels")
        for name, milliseconds, count in profile.longest[:NUM_PRINTED]:
            print(f"{1e3 * milliseconds:9.1f} µs {count:6.1f} ×   {name[:90]}", flush=True)
    return by_depth


def compared(done: list[Any], plain: list[Any]) -> dict[str, Any]:
    """Return the number of texts equal to those without drafts, and the largest gap at the first difference of others.

    The gap is between the log probabilities of the two chosen tokens. Both were the most probable of their pass, so at
    a near tie the gap is rounding only.
    """
    gaps = []
    for a, b in zip(done, plain):
        first = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y), None)
        if first is not None:
            gaps.append(abs(a.logprobs[first] - b.logprobs[first]))
    return {"same_texts": len(done) - len(gaps), "largest_gap": max(gaps, default=0.0)}


def show(row: dict[str, Any], num_prompts: int) -> None:
    """Print one row of the table."""
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


def held_out(source: Path, options: argparse.Namespace) -> list[list[int]]:
    """Return the first tokens of the first held-out rows of the run that trained the model."""
    from megatron_q3n.data.pretrain import build_pretrain_data
    from megatron_q3n.run_directory import CONFIG

    path = source.parent.parent / CONFIG
    if not path.is_file():
        raise UserError(f"{source} is not in a run directory; its validation data are needed as prompts.")
    config: RunConfig = validate(yaml.safe_load(path.read_text()))
    data = build_pretrain_data(config, is_leader=True, barrier=lambda: None)
    rows = list(itertools.islice(data.validation_sample_tokens(), options.prompts))
    if len(rows) < options.prompts:
        raise UserError(f"--prompts {options.prompts}: this run has only {len(rows)} validation rows.")
    return [row[: options.prompt_tokens].tolist() for row in rows]


if __name__ == "__main__":
    sys.exit(main())
