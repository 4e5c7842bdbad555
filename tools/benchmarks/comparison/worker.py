"""Worker process of one contestant: for each request it builds a model, warms up, times steps and frees the model.

Separate processes isolate the contestants' memory, compiled kernels and module-wide settings. Only one measures at a
time, and none keeps a model between requests. Output of libraries goes to the worker's log. Heavy imports happen in
`serve`, in the new process.
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
class MeasureRequest:
    """One request: build this model, measure its steps, free it."""

    config: RunConfig
    part: Part
    warmup: int
    iterations: int
    profiled_steps: int


@dataclass
class Measurement:
    """Result of one request. `failure`: why there is none, or empty."""

    # of each step, by the device clock on a GPU
    seconds: list[float] = field(default_factory=list)
    # per step, by the host clock
    wall_seconds: float = 0.0
    # quantizing weights, once per optimizer step; None: included in the steps
    quantize_seconds: float | None = None
    parameters: int = 0
    mixers: int = 0
    # since before the build, so that the memory of captured graphs is included
    peak_allocated_gib: float = 0.0
    peak_reserved_gib: float = 0.0
    # still allocated after the model was freed
    leaked_gib: float = 0.0
    build_seconds: float = 0.0
    first_step_seconds: float = 0.0
    profile: Any = None
    failure: str = ""

    @property
    def median(self) -> float:
        """Return the median seconds of a step."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ready:
    """First message of a worker: what it runs, and how long its start took."""

    about: dict[str, str]
    device: str
    seconds: float
    refused: str = ""


# requested once, while no other process uses the device
MATMUL_RATE = "measure the matmul rate"


def serve(connection: Connection, contestant: Contestant, config: RunConfig, options: Any, log: Path) -> None:
    """Answer requests (MeasureRequest or MATMUL_RATE) in the new process, until None arrives."""
    started = time.perf_counter()
    _write_to(log)
    try:
        device, runner = _runner(contestant, config, options)
    except UserError as error:
        connection.send(Ready({}, "", 0.0, refused=str(error)))
        return
    connection.send(Ready(runner.about, device.backends["device"], time.perf_counter() - started))
    device_module = importlib.import_module("megatron_q3n.device")
    while (request := connection.recv()) is not None:
        if request == MATMUL_RATE:
            connection.send(device_module.measured_matmul_flops(device, 1))
        else:
            connection.send(_measure_and_free(runner, request, device))


def _runner(contestant: Contestant, config: RunConfig, options: Any) -> tuple[Any, Any]:
    """Choose the device, then import and start the contestant: the CPU shim must precede megatron-core."""
    device_module = importlib.import_module("megatron_q3n.device")
    device_module.quiet_known_warnings()
    if contestant.kind == "transformers":
        device = _plain_device(device_module)
        module = importlib.import_module("tools.benchmarks.comparison.huggingface")
        return device, module.HuggingFace(device, config, options.transformers_gradients)
    device = device_module.select_device(config)
    if contestant.kind == "ours":
        return device, importlib.import_module("tools.benchmarks.comparison.ours").Ours(device, config)
    if not device.is_cuda:
        raise UserError(
            "--contestants stock: megatron-core's Gated DeltaNet needs a GPU, TransformerEngine and FLA; "
            "leave stock out on this machine."
        )
    return device, importlib.import_module("tools.benchmarks.comparison.stock").Stock(device, config, options.stock)


def _plain_device(device_module: Any) -> Any:
    """Return the device without importing megatron-core, which transformers does not use."""
    torch = importlib.import_module("torch")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    what = f"cuda: {torch.cuda.get_device_name()} is present" if kind == "cuda" else "cpu"
    return device_module.Device(torch.device(kind), "none", "torch", {"device": what})


def _write_to(log: Path) -> None:
    """Redirect this process's output to a file."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)


def _measure_and_free(runner: Any, request: MeasureRequest, device: Any) -> Measurement:
    torch = importlib.import_module("torch")
    measurement = Measurement()
    before_gib = 0.0
    if device.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        # memory that an earlier request did not free
        before_gib = torch.cuda.memory_allocated() / 2**30
    try:
        _measure(runner, request, device, measurement)
    except torch.OutOfMemoryError as error:
        measurement.failure = f"out of memory: {str(error).split('.')[0]}"
    measurement.peak_allocated_gib -= before_gib
    runner.free()
    gc.collect()
    if device.is_cuda:
        torch.cuda.empty_cache()
        measurement.leaked_gib = torch.cuda.memory_allocated() / 2**30
    return measurement


def _measure(runner: Any, request: MeasureRequest, device: Any, measurement: Measurement) -> None:
    torch = importlib.import_module("torch")
    started = time.perf_counter()
    runner.build(request.config)
    device.synchronize()
    measurement.build_seconds = time.perf_counter() - started
    measurement.parameters = runner.parameters()
    step, measurement.mixers = _step_of(runner, request, device)
    started = time.perf_counter()
    step()
    device.synchronize()
    measurement.first_step_seconds = time.perf_counter() - started
    for _ in range(request.warmup - 1):
        step()
    measurement.seconds, measurement.wall_seconds = timed(step, request.iterations, device)
    if request.config.precision.fp8 and hasattr(runner, "quantize_weights"):
        # other contestants do it within their steps
        quantizing, _ = timed(runner.quantize_weights, request.iterations, device)
        measurement.quantize_seconds = statistics.median(quantizing)
    measurement.peak_allocated_gib = device.peak_memory_gib()
    if device.is_cuda:
        measurement.peak_reserved_gib = torch.cuda.max_memory_reserved() / 2**30
    if request.profiled_steps:
        groups = importlib.import_module("tools.benchmarks.comparison.kernel_groups")
        measurement.profile = groups.profiled(step, request.profiled_steps, is_cuda=device.is_cuda)


def timed(step: Callable[[], None], iterations: int, device: Any) -> tuple[list[float], float]:
    """Time consecutive steps without a synchronization between them, as in training.

    Returns: seconds of each step (on a GPU by CUDA events between the steps, so that time in which the device waits for
        the host is included), and host seconds per step.
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


def _step_of(runner: Any, request: MeasureRequest, device: Any) -> tuple[Callable[[], None], int]:
    """Return the function to time, and the number of Gated DeltaNet layers if it runs only these, else 0."""
    if request.part == "step":
        return runner.step, 0
    torch = importlib.import_module("torch")
    mixers, config = runner.mixers(), request.config
    training, width = config.training, config.model.hidden_size
    dtype = torch.bfloat16 if config.precision.compute == "bf16" else torch.float32
    shape = (training.sequence_length, training.micro_batch_size, width)
    generator = torch.Generator(device.torch_device).manual_seed(training.seed)
    random_tensor = lambda: torch.randn(shape, generator=generator, device=device.torch_device, dtype=dtype)
    input_TBH, upstream_TBH = random_tensor().requires_grad_(), random_tensor()

    def step() -> None:
        runner.drop_gradients()
        input_TBH.grad = None
        hidden_TBH = input_TBH
        for mixer in mixers:
            hidden_TBH = mixer(hidden_TBH)
        hidden_TBH.backward(upstream_TBH)

    return step, len(mixers)
