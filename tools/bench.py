#!/usr/bin/env python3
"""Measure training steps of a recipe: time, throughput, memory, and where a step's time goes.

    tools/bench.py --config-name pretrain-tiny [setting=value …] [--steps 20] [--json FILE]

Real model, real optimizer, random tokens; nothing is written but the JSON. Model FLOPs are counted
as `megatron_q3n/config/sizes.py` states. Compare ratios within one run: machines and their
neighbours differ.
"""

import time

PROCESS_START = (
    time.perf_counter()
)  # before the slow imports: the time to the first step is what users wait

import argparse  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from megatron_q3n.config import EXIT_BAD_INPUT, RunConfig, UserError  # noqa: E402
from megatron_q3n.config.sizes import flops_per_token  # noqa: E402
from megatron_q3n.train import configure, register_defaults  # noqa: E402


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after the warm-up")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options, rest = parser.parse_known_args()
    register_defaults()
    try:
        config = configure(rest)
        figures = measure(config, options.warmup, options.steps)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


def measure(config: RunConfig, warmup: int, steps: int) -> dict[str, Any]:
    """Train on random tokens and return the figures; seconds unless the name says otherwise."""
    device_room = importlib.import_module("megatron_q3n.device")
    device_room.quiet_known_warnings()
    torch = importlib.import_module("torch")
    parallel = importlib.import_module("megatron_q3n.parallel")
    batch_room = importlib.import_module("megatron_q3n.data.batch")
    training = importlib.import_module("megatron_q3n.training.state")
    step_room = importlib.import_module("megatron_q3n.training.step")
    backend = importlib.import_module("megatron_q3n.kernels.delta_rule_backend")
    build = importlib.import_module("megatron_q3n.model.build")

    device = device_room.choose_device(config)
    group = parallel.initialize(config, device)
    rule = backend.choose(
        device.torch_device, build.compute_dtype(config), config.model.linear_key_head_dim,
        config.model.linear_value_head_dim,
    )  # fmt: skip
    state = training.build_state(config, device, group)
    size, length = config.training.micro_batch_size, config.training.sequence_length
    generator = torch.Generator().manual_seed(group.data_rank)

    def batches() -> list[Any]:
        made = []
        for _ in range(config.num_microbatches):
            rows = torch.randint(
                0, config.model.vocab_size, (size, length + 1), generator=generator
            )
            made.append(
                batch_room.batch_of_rows(
                    rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.ones(size, length)
                )
            )
        return made

    seconds, first = [], None
    for index in range(warmup + steps):
        data = batches()
        device.synchronize()
        started = time.perf_counter()
        step_room.train_step(state, data)
        device.synchronize()
        ended = time.perf_counter()
        first = first if first is not None else ended - PROCESS_START
        if index >= warmup:
            seconds.append(ended - started)
    median = statistics.median(seconds)
    peak = device_room.measured_matmul_flops(device, group.world_size)
    rate = flops_per_token(config.model, length).total * config.tokens_per_step / median
    figures = {
        "recipe": config.recipe,
        "device": device.choices["device"],
        "model_backend": device.model_backend,
        "delta_rule": rule,
        "tokens_per_step": config.tokens_per_step,
        "step_seconds_median": median,
        "step_seconds_min": min(seconds),
        "step_seconds_max": max(seconds),
        "tokens_per_second": config.tokens_per_step / median,
        "model_tflops_per_second": rate / 1e12,
        "mfu_of_measured_matmul": rate / peak if peak else None,
        "time_to_first_step": first,
        "peak_memory_gib": device.peak_memory_gib(),
        "timed_steps": steps,
    }
    parallel.shutdown()
    return figures


def show(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table(show_header=False, box=None)
    for name, value in figures.items():
        shown = (
            f"{value:,.4g}" if isinstance(value, float) else "–" if value is None else str(value)
        )
        table.add_row(name.replace("_", " "), shown)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
