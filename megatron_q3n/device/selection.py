"""Device and backend selection of this process, made once at start-up and written to environment.json."""

import importlib.util
import logging
import os
import platform
import resource
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from megatron_q3n.config import RunConfig, UserError, launch
from megatron_q3n.device import cpu_shim


@dataclass(frozen=True)
class Device:
    """The device of this process and the selected backends.

    `backends` maps a component ("device", "communication", "model", …) to "backend: reason".
    """

    torch_device: torch.device
    communication: str
    model_backend: Literal["torch", "transformer_engine"]
    backends: dict[str, str]

    @property
    def is_cuda(self) -> bool:
        """Whether tensors live on a GPU."""
        return self.torch_device.type == "cuda"

    @property
    def gpu_name(self) -> str | None:
        """Name of the GPU according to CUDA; None on a CPU."""
        return torch.cuda.get_device_name(self.torch_device) if self.is_cuda else None

    def peak_memory_gib(self) -> float:
        """Return the peak memory of this process: allocated GPU memory, or resident memory on a CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated() / 2**30
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # bytes on macOS, KiB on Linux
        return peak / (2**30 if sys.platform == "darwin" else 2**20)

    def synchronize(self) -> None:
        """Wait for queued GPU work, so that host clocks measure it."""
        if self.is_cuda:
            torch.cuda.synchronize()


def select_device(config: RunConfig) -> Device:
    """Select CPU or GPU and the backends, install the CPU shim if needed, and set the thread count.

    Must run before the first import of megatron-core: the shim replaces functions that this import reads.

    Raises: UserError if the configuration needs a device or library that this machine does not have.
    """
    torch.set_num_threads(config.training.threads or 1)
    if torch.cuda.is_available():
        return _cuda(config)
    return _cpu(config)


def measured_matmul_flops(device: Device, world_size: int) -> float | None:
    """Measure the bf16 GEMM rate of one GPU and multiply it by the number of processes; None on a CPU.

    Units: FLOP/s. The operands are random: a product of zeros is measurably faster.
    """
    if not device.is_cuda:
        return None
    size, repeats = 8192, 5
    a, b = (torch.randn(size, size, device=device.torch_device, dtype=torch.bfloat16) for _ in "ab")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
    a @ b
    start.record()
    for _ in range(repeats):
        a @ b
    end.record()
    end.synchronize()
    seconds = start.elapsed_time(end) / 1000 / repeats
    del a, b
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return 2 * size**3 / seconds * world_size


def _cuda(config: RunConfig) -> Device:
    device = torch.device("cuda", launch.local_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    # not the default stream, on which CUDA graphs cannot be captured (training/step_graph.py)
    torch.cuda.set_stream(torch.cuda.Stream(device))
    if config.training.deterministic:
        # required by megatron-core
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    name = torch.cuda.get_device_name(device)
    backend = config.model.backend
    has_te = importlib.util.find_spec("transformer_engine") is not None
    if backend == "transformer_engine" and not has_te:
        raise UserError(
            "model.backend=transformer_engine: TransformerEngine is not installed; "
            "pip install -r requirements-gpu.txt, or set model.backend=auto."
        )
    if config.precision.fp8 and not has_te:
        raise UserError("precision.fp8 needs TransformerEngine: pip install -r requirements-gpu.txt.")
    if config.precision.fp8_recipe == "mxfp8" and config.precision.fp8:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 10:
            raise UserError(
                f"precision.fp8_recipe=mxfp8 needs a Blackwell GPU (compute capability 10), found {name} "
                f"({major}.{minor}); use tensorwise or blockwise."
            )
    use_te, reason = _te_serves(config, has_te)
    return Device(
        torch_device=device,
        communication="nccl",
        model_backend="transformer_engine" if use_te else "torch",
        backends={
            "device": f"cuda: {name} is present",
            "communication": "nccl: the processes have GPUs",
            "model": f"{'transformer_engine' if use_te else 'torch'}: {reason}",
        },
    )


def _te_serves(config: RunConfig, has_te: bool) -> tuple[bool, str]:
    backend = config.model.backend
    if backend == "torch":
        return False, "model.backend=torch"
    if not has_te:
        return False, "TransformerEngine is not installed"
    if backend == "auto" and config.precision.compute == "fp32":
        return False, "TransformerEngine multiplies fp32 matrices in TF32"
    return True, "installed"


def _cpu(config: RunConfig) -> Device:
    if config.training.cuda_graph:
        raise UserError("training.cuda_graph=true needs a GPU; set it false.")
    if config.model.backend == "transformer_engine":
        raise UserError("model.backend=transformer_engine needs a GPU; set model.backend=auto or torch.")
    if config.precision.fp8:
        raise UserError(f"precision.fp8={config.precision.fp8} needs a GPU; set precision.fp8=null.")
    if config.parallel.moe_token_dispatcher_type == "flex":
        raise UserError("parallel.moe_token_dispatcher_type=flex needs GPUs (DeepEP); use alltoall or allgather.")
    cpu_shim.install()
    return Device(
        torch_device=torch.device("cpu"),
        communication="gloo",
        model_backend="torch",
        backends={
            "device": f"cpu: torch sees no CUDA device on this {platform.machine()} machine",
            "communication": "gloo: the processes have no GPUs",
            "model": "torch: TransformerEngine needs a GPU",
        },
    )


_EXPECTED_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    ".*Apex is not installed",
    "absl.logging is not installed",
    "full scope is deprecated",
    "MimoModelConfig is experimental",
    ".*TypedStorage is deprecated",
    # the optimizer reads .grad of its shards
    "The .grad attribute of a Tensor that is not a leaf",
    # raised by checkpoint loads of one process
    "torch.distributed is disabled, unavailable or uninitialized",
    "The argument order of load has been changed",
)
_EXPECTED_LOGS = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "megatron.core.tensor_parallel.random": "CPU RNG state changed within GPU RNG context",
    "megatron.core.rerun_state_machine": "Rerun",
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "async save is deprecated",
}


def quiet_known_warnings() -> None:
    """Suppress known warnings that torch and megatron-core print at every start.

    Most of them report that CUDA, TransformerEngine or apex is absent; environment.json records this, with the backend
    that runs instead. Call it before the first import of megatron-core.
    """
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for logger, message in _EXPECTED_LOGS.items():
        logging.getLogger(logger).addFilter(partial(_does_not_contain, message))


def _does_not_contain(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()
