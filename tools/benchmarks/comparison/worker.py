"""One contestant in a process of its own: it builds, warms up, times and lets go, visit by visit, as told.

A process each keeps the contestants' memory, compiled kernels and module-wide settings apart; they take turns, and
hold no model between visits. What libraries print goes to the worker's log. Nothing heavy is imported before
`serve` runs, which is in the new process.
"""

import gc
import importlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_q3n.config import RunConfig, UserError
from tools.benchmarks.comparison.cases import Contestant, Part


@dataclass(frozen=True)
class Visit:
    """One turn: build this model, run, measure, let go."""

    config: RunConfig
    part: Part
    warmup: int
    iterations: int
    profiled_steps: int


@dataclass
class Reading:
    """What one visit measured. `failure` is empty, or says why nothing was."""

    seconds: list[float] = field(default_factory=list)  # of each step, device clock on a GPU
    wall_seconds: float = 0.0  # per step, host clock
    # quantising weights, once per optimizer step; None: not apart from the steps
    renewing_seconds: float | None = None
    parameters: int = 0
    mixers: int = 0
    # since before the build, so that captured graphs' memory counts
    peak_allocated_gib: float = 0.0
    peak_reserved_gib: float = 0.0
    left_gib: float = 0.0  # still allocated after letting go
    build_seconds: float = 0.0
    first_step_seconds: float = 0.0
    profile: Any = None
    failure: str = ""

    @property
    def median(self) -> float:
        """The visit's own median."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ready:
    """The worker's first word: what it runs, and how long its start took."""

    about: dict[str, str]
    device: str
    seconds: float
    refused: str = ""


MATMUL = "measure the matmul rate"  # asked for once, while nobody else is on the device


def serve(connection: Connection, contestant: Contestant, config: RunConfig, options: Any, log: Path) -> None:
    """Answer orders, a Visit or MATMUL, until told to stop (None). Runs in the new process."""
    started = time.perf_counter()
    _write_to(log)
    try:
        device, runner = _runner(contestant, config, options)
    except UserError as error:
        connection.send(Ready({}, "", 0.0, refused=str(error)))
        return
    connection.send(Ready(runner.about, device.choices["device"], time.perf_counter() - started))
    room = importlib.import_module("megatron_q3n.device")
    while (order := connection.recv()) is not None:
        if order == MATMUL:
            connection.send(room.measured_matmul_flops(device, 1))
        else:
            connection.send(_answer(runner, order, device))


def _runner(contestant: Contestant, config: RunConfig, options: Any) -> tuple[Any, Any]:
    """Choose the device, then import and start the contestant: the device shim must come before megatron-core."""
    room = importlib.import_module("megatron_q3n.device")
    room.quiet_known_warnings()
    if contestant.kind == "transformers":
        device = _plain_device(room)
        module = importlib.import_module("benchmark.huggingface")
        return device, module.HuggingFace(device, config, options.transformers_gradients)
    device = room.choose_device(config)
    if contestant.kind == "ours":
        return device, importlib.import_module("benchmark.ours").Ours(device, config)
    if not device.is_cuda:
        raise UserError(
            "--contestants stock: megatron-core's Gated DeltaNet needs a GPU, TransformerEngine and FLA; "
            "leave stock out on this machine."
        )
    return device, importlib.import_module("benchmark.stock").Stock(device, config, options.stock)


def _plain_device(room: Any) -> Any:
    """Describe the device without megatron-core, which transformers does not use."""
    torch = importlib.import_module("torch")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    what = f"cuda: {torch.cuda.get_device_name()} is there" if kind == "cuda" else "cpu"
    return room.Device(torch.device(kind), "none", "torch", {"device": what})


def _write_to(log: Path) -> None:
    """Send what this process prints to a file."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)


def _answer(runner: Any, visit: Visit, device: Any) -> Reading:
    torch = importlib.import_module("torch")
    reading = Reading()
    before_gib = 0.0
    if device.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before_gib = torch.cuda.memory_allocated() / 2**30  # what an earlier visit did not let go
    try:
        _measure(runner, visit, device, reading)
    except torch.OutOfMemoryError as error:
        reading.failure = f"out of memory: {str(error).split('.')[0]}"
    reading.peak_allocated_gib -= before_gib
    runner.free()
    gc.collect()
    if device.is_cuda:
        torch.cuda.empty_cache()
        reading.left_gib = torch.cuda.memory_allocated() / 2**30
    return reading


def _measure(runner: Any, visit: Visit, device: Any, reading: Reading) -> None:
    torch = importlib.import_module("torch")
    started = time.perf_counter()
    runner.build(visit.config)
    device.synchronize()
    reading.build_seconds = time.perf_counter() - started
    reading.parameters = runner.parameters()
    step, reading.mixers = _step_of(runner, visit, device)
    started = time.perf_counter()
    step()
    device.synchronize()
    reading.first_step_seconds = time.perf_counter() - started
    for _ in range(visit.warmup - 1):
        step()
    reading.seconds, reading.wall_seconds = timed(step, visit.iterations, device)
    if visit.config.precision.fp8 and hasattr(runner, "renew_weights"):  # the others do it within their steps
        renewing, _ = timed(runner.renew_weights, visit.iterations, device)
        reading.renewing_seconds = statistics.median(renewing)
    reading.peak_allocated_gib = device.peak_memory_gib()
    if device.is_cuda:
        reading.peak_reserved_gib = torch.cuda.max_memory_reserved() / 2**30
    if visit.profiled_steps:
        groups = importlib.import_module("benchmark.kernel_groups")
        reading.profile = groups.profiled(step, visit.profiled_steps, is_cuda=device.is_cuda)


def timed(step: Callable[[], None], iterations: int, device: Any) -> tuple[list[float], float]:
    """Time steps that follow each other without a wait between them, as in training.

    Returns: seconds of each step (device clock on a GPU, from one step's mark in the queue to the next,
        so that a device waiting for the host counts), and host seconds per step.
    """
    torch = importlib.import_module("torch")
    device.synchronize()
    started = time.perf_counter()
    if device.is_cuda:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        device.synchronize()
        seconds = [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]
    else:
        edges = [started]
        for _ in range(iterations):
            step()
            edges.append(time.perf_counter())
        seconds = [b - a for a, b in pairwise(edges)]
    return seconds, (time.perf_counter() - started) / iterations


def _step_of(runner: Any, visit: Visit, device: Any) -> tuple[Callable[[], None], int]:
    """Return what is timed, and how many Gated DeltaNet layers it runs if it is only these."""
    if visit.part == "step":
        return runner.step, 0
    torch = importlib.import_module("torch")
    mixers, config = runner.mixers(), visit.config
    training, width = config.training, config.model.hidden_size
    dtype = torch.bfloat16 if config.precision.compute == "bf16" else torch.float32
    shape = (training.sequence_length, training.micro_batch_size, width)
    generator = torch.Generator(device.torch_device).manual_seed(training.seed)
    draw = lambda: torch.randn(shape, generator=generator, device=device.torch_device, dtype=dtype)
    input_TBH, upstream_TBH = draw().requires_grad_(), draw()

    def step() -> None:
        runner.drop_gradients()
        input_TBH.grad = None
        hidden_TBH = input_TBH
        for mixer in mixers:
            hidden_TBH = mixer(hidden_TBH)
        hidden_TBH.backward(upstream_TBH)

    return step, len(mixers)
