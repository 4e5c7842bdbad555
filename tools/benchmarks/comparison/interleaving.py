"""Interleaved measurement of all contestants: order, worker processes, and failures.

All workers start at the same time and wait for requests. Case by case and round by round, each contestant is measured
with one and with two periods. The order is reversed every other round, so that a drift of the machine affects all
contestants equally. A contestant whose process ends is excluded, with the last lines of its log; the others continue.
"""

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from megatron_q3n.config import RunConfig, UserError
from tools.benchmarks.comparison.cases import PERIODS, Case, Contestant, Part
from tools.benchmarks.comparison.worker import MATMUL_RATE, Measurement, MeasureRequest, Ready, serve

LOG_LINES = 25


@dataclass(frozen=True)
class Options:
    """Numbers of rounds and steps, and options of single contestants."""

    part: Part
    rounds: int
    iterations: int
    warmup: int
    profiled_steps: int
    stock: dict[str, Any]
    transformers_gradients: Literal["bf16", "fp32"]


@dataclass
class ContestantProcess:
    """A contestant's worker process, its description, and its measurements by case and periods, one per round."""

    contestant: Contestant
    process: Any
    connection: Connection
    log: Path
    ready: Ready | None = None
    measurements: dict[tuple[Case, int], list[Measurement]] = field(default_factory=dict)
    first_step_seconds: float | None = None
    failure: str = ""

    def send_request(self, request: Any) -> Any:
        """Send a request and return the answer; None, with `failure` set, if the process ended."""
        # a process that has ended is detected by receive()
        with contextlib.suppress(ConnectionError):
            self.connection.send(request)
        return self.receive()

    def receive(self) -> Any:
        """Return the worker's next message; None, with `failure` set, if the process ended."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            self.failure = "\n".join([f"ended with status {self.process.exitcode}", *lines])
            return None


Configurations = dict[tuple[Case, Contestant, int], RunConfig]


def measure_all(
    configurations: Configurations, options: Options, logs: Path, report: Callable[[str], None]
) -> tuple[list[ContestantProcess], float | None]:
    """Run the whole comparison.

    Returns: the contestants with their measurements, and the device's measured matmul rate in FLOP/s.
    Raises: UserError where a contestant cannot run on this machine.
    """
    contestants = list(dict.fromkeys(contestant for _, contestant, _ in configurations))
    entries = [_start_worker(c, configurations, options, logs) for c in contestants]
    try:
        for entry in entries:
            entry.ready = entry.receive()
            if entry.ready and entry.ready.refused:
                raise UserError(entry.ready.refused)
            report(f"{entry.contestant.label}: {_describe_start(entry)}")
        flops = next((p.send_request(MATMUL_RATE) for p in entries if not p.failure), None)
        for case in dict.fromkeys(case for case, _, _ in configurations):
            _measure_case(case, entries, configurations, options, report)
    finally:
        _stop_workers(entries)
    return entries, flops


def _measure_case(
    case: Case, entries: list[ContestantProcess], configurations: Configurations, options: Options, report: Any
) -> None:
    sizes = PERIODS if options.part == "step" else PERIODS[:1]
    for round_index in range(options.rounds):
        for periods in sizes:
            for entry in entries if round_index % 2 == 0 else entries[::-1]:
                if entry.failure:
                    continue
                config = configurations[case, entry.contestant, periods]
                profiled = options.profiled_steps if round_index == options.rounds - 1 else 0
                request = MeasureRequest(config, options.part, options.warmup, options.iterations, profiled)
                began = time.perf_counter()
                measurement = entry.send_request(request)
                if measurement is not None:
                    entry.measurements.setdefault((case, periods), []).append(measurement)
                    _note_first_step(entry, measurement)
                description = _describe_measurement(measurement, entry)
                report(
                    f"[{time.perf_counter() - began:5.1f} s] {case.label}, {periods} period(s), "
                    f"round {round_index + 1}, {entry.contestant.label}: {description}"
                )


def _note_first_step(entry: ContestantProcess, measurement: Measurement) -> None:
    if entry.first_step_seconds is None and not measurement.failure and entry.ready:
        first = measurement.build_seconds + measurement.first_step_seconds
        entry.first_step_seconds = entry.ready.seconds + first


def _start_worker(
    contestant: Contestant, configurations: Configurations, options: Options, logs: Path
) -> ContestantProcess:
    # a fork cannot share a CUDA context
    context = multiprocessing.get_context("spawn")
    own_end, worker_end = context.Pipe()
    log = logs / f"{contestant.label.replace(':', '-')}.log"
    log.unlink(missing_ok=True)
    config = next(c for (_, candidate, _), c in configurations.items() if candidate == contestant)
    process = context.Process(target=serve, args=(worker_end, contestant, config, options, log), daemon=True)
    process.start()
    worker_end.close()
    return ContestantProcess(contestant, process, own_end, log)


def _stop_workers(entries: list[ContestantProcess]) -> None:
    for entry in entries:
        if entry.process.is_alive():
            # it may end in between
            with contextlib.suppress(ConnectionError):
                entry.connection.send(None)
    for entry in entries:
        entry.process.join(20)
        if entry.process.is_alive():
            entry.process.terminate()


def _describe_start(entry: ContestantProcess) -> str:
    if entry.ready is None:
        return f"failed: {entry.failure}"
    about = "; ".join(f"{name} {value}" for name, value in entry.ready.about.items())
    return f"ready after {entry.ready.seconds:.1f} s; {about}"


def _describe_measurement(measurement: Measurement | None, entry: ContestantProcess) -> str:
    if measurement is None:
        return f"failed: {entry.failure}"
    if measurement.failure:
        return measurement.failure
    left = f", {measurement.leaked_gib:.1f} GiB not freed" if measurement.leaked_gib > 0.5 else ""
    return (
        f"{measurement.median * 1000:.1f} ms a step, peak {measurement.peak_allocated_gib:.1f} GiB, "
        f"build {measurement.build_seconds:.1f} s, first step {measurement.first_step_seconds:.1f} s{left}"
    )
