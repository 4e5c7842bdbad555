"""What this process runs on, decided once at start and written to environment.json."""

import importlib.util
import logging
import os
import platform
import resource
import sys
import warnings
from dataclasses import dataclass
from functools import partial

import torch

from megatron_q3n.config import RunConfig, UserError, launch
from megatron_q3n.device import cpu_shim


@dataclass(frozen=True)
class Device:
    """The device of this process and the libraries chosen for it, each with its reason.

    `choices` maps a component ("backend", "communication", "model", …) to "what: why".
    """

    torch_device: torch.device
    communication: str
    model_backend: str
    choices: dict[str, str]

    @property
    def is_cuda(self) -> bool:
        """Whether tensors live on a GPU."""
        return self.torch_device.type == "cuda"

    @property
    def gpu_name(self) -> str | None:
        """What the GPU calls itself; None on a CPU."""
        return torch.cuda.get_device_name(self.torch_device) if self.is_cuda else None

    def peak_memory_gib(self) -> float:
        """Return the peak memory of this process: allocated GPU memory, or resident memory on a CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated() / 2**30
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux

    def synchronize(self) -> None:
        """Wait for queued GPU work, so that a host clock reads true."""
        if self.is_cuda:
            torch.cuda.synchronize()


def choose_device(config: RunConfig) -> Device:
    """Decide on CPU or GPU, install the CPU shim if needed, and set the thread count.

    Must run before anything imports megatron-core: the shim replaces what that import looks at.

    Raises: UserError if the configuration asks for what this machine lacks.
    """
    torch.set_num_threads(config.training.threads or 1)
    if torch.cuda.is_available():
        return _cuda(config)
    return _cpu(config)


def measured_matmul_flops(device: Device, world_size: int) -> float | None:
    """Measure the bf16 matrix product rate of one GPU, times the processes; None on a CPU, which has no one peak.

    Units: FLOP/s. Random data: a product of zeros runs measurably faster than real ones.
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
    # not the default stream, which no CUDA graph can be captured on (training/step_graph.py)
    torch.cuda.set_stream(torch.cuda.Stream(device))
    if config.training.deterministic:
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # megatron-core insists on it
    name = torch.cuda.get_device_name(device)
    wanted = config.model.backend
    has_te = importlib.util.find_spec("transformer_engine") is not None
    if wanted == "transformer_engine" and not has_te:
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
        choices={
            "device": f"cuda: {name} is there",
            "communication": "nccl: the processes have GPUs",
            "model": f"{'transformer_engine' if use_te else 'torch'}: {reason}",
        },
    )


def _te_serves(config: RunConfig, has_te: bool) -> tuple[bool, str]:
    wanted = config.model.backend
    if wanted == "torch":
        return False, "model.backend=torch"
    if not has_te:
        return False, "TransformerEngine is not installed"
    if wanted == "auto" and config.precision.compute == "fp32":
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
        choices={
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
    "The .grad attribute of a Tensor that is not a leaf",  # the optimizer asks its shards for it
    "torch.distributed is disabled, unavailable or uninitialized",  # said by loads of one process
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
    """Silence, by name, what torch and megatron-core say on every start whether or not it matters here.

    Most of it is that CUDA, TransformerEngine or apex is absent: environment.json says so once,
    with what runs instead. Call it before the first import of megatron-core.
    """
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for logger, message in _EXPECTED_LOGS.items():
        logging.getLogger(logger).addFilter(partial(_lacks, message))


def _lacks(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()
