"""Whole training steps of a recipe, optimizer included, on random tokens: this project alone."""

import importlib
import statistics
import time
from dataclasses import asdict
from typing import Any

from megatron_q3n.config import RunConfig
from megatron_q3n.config.sizes import flops_per_token


def measure(config: RunConfig, *, process_start: float, warmup: int, steps: int, profiled_steps: int) -> dict[str, Any]:
    """Train and return the figures, in seconds unless the name has another unit.

    process_start: time.perf_counter() when the process began, for the time to the first step.
    """
    phases = {"before torch": time.perf_counter() - process_start}
    marked = time.perf_counter()

    def phase(name: str) -> None:
        nonlocal marked
        now = time.perf_counter()
        phases[name], marked = now - marked, now

    # before torch is imported, as in train.py
    importlib.import_module("megatron_q3n.kernels.startup.compile_ahead").start(config)
    # late imports: their time is a phase, and the device must be chosen before megatron-core is imported
    device_module = importlib.import_module("megatron_q3n.device")
    device_module.quiet_known_warnings()
    phase("torch")
    device = device_module.select_device(config)
    phase("device")
    parallel = importlib.import_module("megatron_q3n.parallel")
    phase("megatron-core and libraries")
    training = importlib.import_module("megatron_q3n.training.state")
    step_module = importlib.import_module("megatron_q3n.training.step")
    qualification = importlib.import_module("megatron_q3n.kernels.startup.qualification")
    transformer_config = importlib.import_module("megatron_q3n.model.transformer_config")
    phase("this project")
    group = parallel.initialize(config, device)
    phase("process groups")
    kernels = qualification.qualify(config, device.torch_device, transformer_config.compute_dtype(config))
    phase("kernels qualified")
    state = training.build_state(config, device, group)
    phase("model and optimizer built")

    batches = random_batches(config, group.data_rank)
    seconds, first = [], None
    for index in range(warmup + steps):
        data = next(batches)
        device.synchronize()
        started = time.perf_counter()
        step_module.train_step(state, data)
        device.synchronize()
        ended = time.perf_counter()
        if first is None:
            first = ended - process_start
            phase("first step")
        if index >= warmup:
            seconds.append(ended - started)
    median = statistics.median(seconds)
    figures = {
        "recipe": config.recipe,
        "device": device.backends["device"],
        "model_backend": device.model_backend,
        "kernels": kernels,
        "tokens_per_step": config.tokens_per_step,
        "step_seconds_median": median,
        "step_seconds_min": min(seconds),
        "step_seconds_max": max(seconds),
        "tokens_per_second": config.tokens_per_step / median,
        "peak_memory_gib": device.peak_memory_gib(),
        "time_to_first_step": first,
        "phases_seconds": phases,
        "checks_seconds": qualification.seconds(),
        "timed_steps": steps,
    }
    if profiled_steps:
        data = next(batches)
        figures |= _profile(lambda: step_module.train_step(state, data), profiled_steps, device)
        figures["gap_ms"] = median * 1000 - figures["busy_ms"]
    peak = device_module.measured_matmul_flops(device, group.world_size)
    length = config.training.sequence_length
    rate = flops_per_token(config.model, length).total * config.tokens_per_step / median
    figures["model_tflops_per_second"] = rate / 1e12
    figures["mfu_of_measured_matmul"] = rate / peak if peak else None
    parallel.shutdown()
    return figures


def random_batches(config: RunConfig, data_rank: int) -> Any:
    """Yield the micro-batches of one step after another."""
    torch = importlib.import_module("torch")
    batch_module = importlib.import_module("megatron_q3n.data.batch")
    generator = torch.Generator().manual_seed(data_rank)
    size, length = config.training.micro_batch_size, config.training.sequence_length
    shape = (size, length + 1)
    while True:
        batches = []
        for _ in range(config.num_microbatches):
            rows = torch.randint(0, config.model.vocab_size, shape, generator=generator)
            tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
            batches.append(batch_module.causal_batch(tokens, labels, torch.ones(size, length)))
        yield batches


def _profile(step: Any, steps: int, device: Any) -> dict[str, Any]:
    groups = importlib.import_module("tools.benchmarks.comparison.kernel_groups")
    figures = asdict(groups.profiled(step, steps, is_cuda=device.is_cuda))
    figures["longest_kernels"] = figures.pop("longest")
    return figures
