#!/usr/bin/env python3
"""What looking inside the model costs: steps with and without instruments, by turns, in one process.

    tools/benchmarks/instruments_cost.py --config-name pretrain-small [--looks 12] [--every 10] [--json FILE] [setting=value …]

Steps are whole ones as training takes them, a CUDA graph where the recipe's are, on random tokens. A block of --every
steps without instruments is followed by one of as many with them, of which one is looked at; so on until --looks looks
are timed. The share is what a look takes over what `instruments.interval_steps` steps take. Between looks instruments
are two calls that return at once; that row shows it, as far as steps of one length can be told apart. Leaves nothing
but --json.
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

# kernels compile, the third step is captured, and one look at least has been taken
WARMUP_STEPS = 6
PROMISED_SHARE = 0.01


def main() -> int:
    """Measure and print. Returns: 0; 2 for bad input."""
    options, rest = _parser().parse_known_args()
    register_defaults()
    try:
        config = configure(["--config-name", options.config_name, *rest])
        interval = config.instruments.interval_steps
        if interval == 0:
            raise UserError("instruments.interval_steps=0 never looks: there is nothing to measure.")
        if min(options.looks, options.every) < 1:
            raise UserError("--looks and --every must be at least 1.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    timed = measure(config, options.looks, options.every)
    found = {"recipe": options.config_name, **summary(timed, interval)}
    if options.json:
        options.json.write_text(json.dumps({**found, "seconds": timed}, indent=1) + "\n")
    print("\n".join(f"{name:<34} {value}" for name, value in found.items()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config-name", required=True, metavar="RECIPE")
    parser.add_argument("--looks", type=int, default=12)
    parser.add_argument("--every", type=int, default=10, help="steps in a block")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def measure(config: RunConfig, looks: int, every: int) -> dict[str, list[float]]:
    """Train; return the seconds of every step without instruments, with them between looks, and of those looked at."""
    steps = WARMUP_STEPS + (2 * looks + 2) * every  # the schedule must not end before
    tree = config.model_dump(mode="json")
    tree["instruments"]["interval_steps"] = every
    tree["training"]["steps"] = max(steps, config.training.steps)
    # late: the device must be chosen before megatron-core loads
    device_room = importlib.import_module("megatron_q3n.device")
    device_room.quiet_known_warnings()
    config = validate(tree)
    device = device_room.choose_device(config)
    parallel = importlib.import_module("megatron_q3n.parallel")
    group = parallel.initialize(config, device)
    qualification = importlib.import_module("megatron_q3n.kernels.startup.qualification")
    build = importlib.import_module("megatron_q3n.model.build")
    qualification.qualify(config, device.torch_device, build.compute_dtype(config))
    state = importlib.import_module("megatron_q3n.training.state").build_state(config, device, group)
    instruments = importlib.import_module("megatron_q3n.instruments").Instruments(state)
    take = Steps(state, instruments)
    for _ in range(max(WARMUP_STEPS, every + 1)):
        take.one(watched=True)  # the first step is always looked at
    timed: dict[str, list[float]] = {"without": [], "between looks": [], "looked at": []}
    for _ in range(looks):
        timed["without"] += [take.one(watched=False) for _ in range(every)]
        for _ in range(every):
            looked = instruments.measures(state.step + 1)
            timed["looked at" if looked else "between looks"].append(take.one(watched=True))
    parallel.shutdown()
    return timed


class Steps:
    """Takes training steps as the loop does, and times them."""

    def __init__(self, state: Any, instruments: Any) -> None:
        self._state, self._instruments = state, instruments
        self._batches = _random_batches(state.config, state.device.torch_device)
        self._train_step = importlib.import_module("megatron_q3n.training.step").train_step

    def one(self, *, watched: bool) -> float:
        """Take a step, with the instruments or without. Returns: seconds."""
        data = self._batches
        self._state.device.synchronize()
        started = time.perf_counter()
        if watched:
            self._instruments.before_step()
        report = self._train_step(self._state, data)
        if watched:
            self._instruments.after_step(data, report)
        self._state.device.synchronize()
        return time.perf_counter() - started


def _random_batches(config: RunConfig, device: Any) -> list[Any]:
    """Return the micro-batches of a step, all the same one."""
    tokens = importlib.import_module("benchmark.tokens")
    batch_room = importlib.import_module("megatron_q3n.data.batch")
    rows, labels = tokens.random_rows(config, device)
    batch = batch_room.batch_of_rows(rows, labels, rows.new_ones(rows.shape).float())
    return [batch] * config.num_microbatches


def summary(timed: dict[str, list[float]], interval: int) -> dict[str, Any]:
    """Return the figures for people: medians, and the share of a run's time."""
    plain = statistics.median(timed["without"])
    between = statistics.median(timed["between looks"] or timed["without"]) - plain
    look = statistics.median(timed["looked at"]) - plain
    share = look / (plain * interval)
    return {
        "step, ms": round(1000 * plain, 3),
        "more between looks, ms": round(1000 * between, 3),
        "more for a look, ms": round(1000 * look, 3),
        "looks": len(timed["looked at"]),
        "instruments.interval_steps": interval,
        "share of a run's time": f"{100 * share:.2f} %",
        "within the promised 1 %": share <= PROMISED_SHARE,
    }


if __name__ == "__main__":
    sys.exit(main())
