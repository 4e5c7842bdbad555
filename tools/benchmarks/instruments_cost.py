#!/usr/bin/env python3
"""Cost of the instruments: steps with and without them, alternating, in one process.

    tools/benchmarks/instruments_cost.py --config-name RECIPE [--measurements 12] [--every 10] [--json FILE]
        [setting=value …]

Whole training steps are timed, as CUDA graphs if the recipe uses them, on random tokens. A block of --every steps
without instruments alternates with a block of --every steps with them, one of which is measured by the instruments,
until --measurements measured steps are timed. The reported share is the extra time of a measured step divided by the
time of `instruments.interval_steps` steps. Between measured steps the instruments are two calls that return
immediately; a separate row shows their cost. Only --json writes a file.
"""

import argparse
import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from megatron_q3n.config import EXIT_BAD_INPUT, RunConfig, UserError, validate
from megatron_q3n.recipe import configure, register_defaults

# kernels are compiled, the third step is captured, and at least one step is measured
WARMUP_STEPS = 6
MAX_SHARE = 0.01


def main() -> int:
    """Measure and print. Returns: 0; 2 for bad input."""
    options, rest = _parser().parse_known_args()
    register_defaults()
    try:
        config = configure(["--config-name", options.config_name, *rest])
        interval = config.instruments.interval_steps
        if interval == 0:
            raise UserError("instruments.interval_steps=0 disables the instruments: there is nothing to measure.")
        if min(options.measurements, options.every) < 1:
            raise UserError("--measurements and --every must be at least 1.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    timed = measure(config, options.measurements, options.every)
    figures = {"recipe": options.config_name, **summary(timed, interval)}
    if options.json:
        options.json.write_text(json.dumps({**figures, "seconds": timed}, indent=1) + "\n")
    print("\n".join(f"{name:<34} {value}" for name, value in figures.items()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config-name", required=True, metavar="RECIPE")
    parser.add_argument("--measurements", type=int, default=12)
    parser.add_argument("--every", type=int, default=10, help="steps in a block")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def measure(config: RunConfig, measurements: int, every: int) -> dict[str, list[float]]:
    """Train; return the seconds of steps without instruments, between measured steps, and of measured steps."""
    # the schedule must not end earlier
    steps = WARMUP_STEPS + (2 * measurements + 2) * every
    tree = config.model_dump(mode="json")
    tree["instruments"]["interval_steps"] = every
    tree["training"]["steps"] = max(steps, config.training.steps)
    # late imports: the device must be chosen before megatron-core is imported
    device_module = importlib.import_module("megatron_q3n.device")
    device_module.quiet_known_warnings()
    config = validate(tree)
    device = device_module.select_device(config)
    parallel = importlib.import_module("megatron_q3n.parallel")
    group = parallel.initialize(config, device)
    qualification = importlib.import_module("megatron_q3n.kernels.startup.qualification")
    transformer_config = importlib.import_module("megatron_q3n.model.transformer_config")
    qualification.qualify(config, device.torch_device, transformer_config.compute_dtype(config))
    state = importlib.import_module("megatron_q3n.training.state").build_state(config, device, group)
    instruments = importlib.import_module("megatron_q3n.instruments").Instruments(state)
    stepper = Stepper(state, instruments)
    for _ in range(max(WARMUP_STEPS, every + 1)):
        stepper.step(measured=True)
    timed: dict[str, list[float]] = {"without": [], "between measured": [], "measured": []}
    for _ in range(measurements):
        timed["without"] += [stepper.step(measured=False) for _ in range(every)]
        for _ in range(every):
            is_measured = instruments.is_measured(state.step + 1)
            timed["measured" if is_measured else "between measured"].append(stepper.step(measured=True))
    parallel.shutdown()
    return timed


class Stepper:
    """Runs training steps as the training loop does, and times them."""

    def __init__(self, state: Any, instruments: Any) -> None:
        self._state, self._instruments = state, instruments
        self._batches = _random_batches(state.config, state.device.torch_device)
        self._train_step = importlib.import_module("megatron_q3n.training.step").train_step

    def step(self, *, measured: bool) -> float:
        """Run a step with or without the instruments. Returns: seconds."""
        data = self._batches
        self._state.device.synchronize()
        started = time.perf_counter()
        if measured:
            self._instruments.before_step(self._state.step + 1)
        report = self._train_step(self._state, data)
        if measured:
            self._instruments.measure(report)
        self._state.device.synchronize()
        return time.perf_counter() - started


def _random_batches(config: RunConfig, device: Any) -> list[Any]:
    """Return the micro-batches of a step, all equal."""
    tokens = importlib.import_module("tools.benchmarks.comparison.tokens")
    batch_module = importlib.import_module("megatron_q3n.data.batch")
    rows, labels = tokens.random_rows(config, device)
    batch = batch_module.causal_batch(rows, labels, rows.new_ones(rows.shape).float())
    return [batch] * config.num_microbatches


def summary(timed: dict[str, list[float]], interval: int) -> dict[str, Any]:
    """Return the figures to print: medians, and the share of a run's time."""
    plain = statistics.median(timed["without"])
    between = statistics.median(timed["between measured"] or timed["without"]) - plain
    extra = statistics.median(timed["measured"]) - plain
    share = extra / (plain * interval)
    return {
        "step, ms": round(1000 * plain, 3),
        "more between measured steps, ms": round(1000 * between, 3),
        "more for a measured step, ms": round(1000 * extra, 3),
        "measurements": len(timed["measured"]),
        "instruments.interval_steps": interval,
        "share of a run's time": f"{100 * share:.2f} %",
        "within 1 %": share <= MAX_SHARE,
    }


if __name__ == "__main__":
    sys.exit(main())
