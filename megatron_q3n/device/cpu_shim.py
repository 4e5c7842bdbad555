"""CPU shim: patches of torch and megatron-core, so that megatron-core runs on machines without CUDA.

megatron-core's distributed optimizer, schedules, checkpoints and datasets do not depend on the device, but name CUDA in
their code (`device="cuda"`, `torch.cuda.current_device()`, a comparison with `'torch.cuda.FloatTensor'`). Each patch
names the call site that needs it (megatron-core 0.19.2). Nothing is patched on machines with CUDA.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.utils import _device as torch_device

_CPU = torch.device("cpu")
_FACTORIES = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "randint",
    "zeros_like",
    "ones_like",
    "empty_like",
)


class CpuEvent:
    """Replacement of torch.cuda.Event: on a CPU all recorded work has completed."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        """Return True: the event has completed."""
        return True

    def elapsed_time(self, _: "CpuEvent") -> float:
        """Return 0: CPU work is timed with host clocks."""
        return 0.0


class CpuStream:
    """Replacement of torch.cuda.Stream: a CPU process has one stream, its program order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = _CPU

    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """Return a completed event."""
        return event or CpuEvent()

    def query(self) -> bool:
        """Return True: all work is done."""
        return True


_installed = False


def install() -> None:
    """Install the patches once; a no-op on machines with CUDA."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    # megatron-core uses the Adam of these packages where they are installed, and it needs a GPU
    # (megatron/core/optimizer/__init__.py:14, megatron/core/optimizer/distrib_optimizer.py:24)
    for name in ("transformer_engine", "apex"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    _replace_cuda_calls()
    _replace_tensor_methods()
    # torch lists its factory functions once, for `with torch.device(...)`: it must list the unpatched ones
    torch_device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # megatron-core wraps small functions in torch.compile (megatron/core/jit.py); compiling them for a CPU costs
    # minutes.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # late: the import is slow, and only CPU runs need it
    from torch import _dynamo

    _dynamo.config.disable = True
    _patch_megatron()


def _replace_cuda_calls() -> None:
    cuda: Any = torch.cuda
    stream = CpuStream()
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda *_: None
    cuda.device_count = lambda: 0
    cuda.synchronize = lambda *_, **__: None
    cuda.empty_cache = lambda: None
    cuda.Stream, cuda.Event = CpuStream, CpuEvent
    cuda.current_stream = cuda.default_stream = lambda *_: stream
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    # megatron/core/tensor_parallel/random.py:303-345,490 keep the model-parallel RNG in torch.cuda's generator
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.max_memory_allocated = cuda.memory_allocated = lambda *_: 0


def _replace_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    tensor.cuda = lambda self, *_, **__: self
    module.cuda = lambda self, *_, **__: self
    tensor.pin_memory = lambda self, *_, **__: self
    plain_type = torch.Tensor.type

    def cuda_named_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # megatron/core/optimizer/clip_grads.py:174, megatron/core/optimizer/distrib_optimizer.py:401/466/758,
        # megatron/core/optimizer/optimizer.py:1009/1028 compare with 'torch.cuda.…Tensor'
        named = plain_type(self, *args, **kwargs)
        return named.replace("torch.", "torch.cuda.", 1) if isinstance(named, str) else named

    tensor.type = cuda_named_type


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return a tensor factory with device="cuda" mapped to the CPU, and without pinned memory.

    Pinned memory: megatron/core/models/common/embeddings/rope_utils.py:62.
    """

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def _patch_megatron() -> None:
    """Replace the megatron-core functions that use CUDA or TransformerEngine by name."""
    # late: only after torch was patched
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # CheckpointFunction and CheckpointWithoutOutput enter these TransformerEngine contexts unconditionally
    for name, stub in {
        "FP8GlobalStateManager": type("NoFP8", (), {"is_fp8_enabled": staticmethod(lambda: False)}),
        "activation_recompute_forward": lambda **_: contextlib.nullcontext(),
        "fp8_autocast": lambda **_: contextlib.nullcontext(),
    }.items():
        if getattr(random, name, None) is None:
            setattr(random, name, stub)

    move = token_dispatcher.maybe_move_tensor_to_cpu

    def splits_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # megatron/core/transformer/moe/token_dispatcher.py:927-943: a tensor already on the CPU stays a tensor, and
        # gloo's all_to_all rejects it as splits
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return move(tensor, as_numpy=as_numpy, record_stream=False)

    token_dispatcher.maybe_move_tensor_to_cpu = splits_as_numpy
    _patch_uneven_collectives()
    _patch_coalescing()


def _patch_uneven_collectives() -> None:
    """Patch all-gather and reduce-scatter of unequal lengths, which NCCL supports and gloo does not.

    Expert tensor parallelism over several expert-parallel ranks needs both
    (megatron/core/transformer/moe/token_dispatcher.py:739).
    """
    # late, as above
    from megatron.core.tensor_parallel import mappings

    even_gather = mappings._gather_along_first_dim
    even_scatter = mappings._reduce_scatter_along_first_dim

    def gather(part: Any, group: ProcessGroup, lengths: Any = None, use_global_buffer: bool = False) -> Any:
        if group.size() == 1 or lengths is None:
            return even_gather(part, group, None, use_global_buffer)
        padded = part.new_zeros(max(lengths), *part.shape[1:])
        padded[: len(part)] = part
        gathered = [torch.empty_like(padded) for _ in lengths]
        torch.distributed.all_gather(gathered, padded, group=group)
        return torch.cat([part[:length] for part, length in zip(gathered, lengths)])

    def reduce_scatter(whole: Any, group: ProcessGroup, lengths: Any = None, use_global_buffer: bool = False) -> Any:
        if group.size() == 1 or lengths is None:
            return even_scatter(whole, group, None, use_global_buffer)
        total = whole.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split([int(length) for length in lengths])[group.rank()].contiguous()

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = reduce_scatter


class _SeparateCollectives:
    """Replacement of torch's _coalescing_manager: starts each collective separately, and waits for all of them."""

    _active: "_SeparateCollectives | None" = None

    def __init__(self, *_: Any, async_ops: bool = False, **__: Any) -> None:
        self.async_ops, self.works = async_ops, list[Any]()

    def __enter__(self) -> "_SeparateCollectives":
        _SeparateCollectives._active = self
        return self

    def __exit__(self, *_: object) -> None:
        _SeparateCollectives._active = None
        if not self.async_ops:
            self.wait()

    def wait(self) -> None:
        """Wait for every collective of the group."""
        for work in self.works:
            work.wait()


def _patch_coalescing() -> None:
    """Run coalesced collectives separately: gloo concatenates coalesced tensors as if they had one dtype.

    Otherwise parameters of a bf16 model's later pipeline chunks, bf16 and fp32 in one group, are gathered wrongly
    (megatron/core/distributed/param_and_grad_buffer.py:485).
    """
    # late, as above
    from megatron.core.distributed import param_and_grad_buffer as buffers

    def separately(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def start(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            if _SeparateCollectives._active is None:
                return collective(*args, async_op=async_op, **kwargs)
            _SeparateCollectives._active.works.append(collective(*args, async_op=True, **kwargs))
            return None

        return start

    buffers._coalescing_manager = _SeparateCollectives
    buffers.dist_all_gather_func = separately(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = separately(buffers.dist_reduce_scatter_func)
