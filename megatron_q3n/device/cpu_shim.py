"""Let megatron-core run where there is no CUDA: the smallest set of replacements that its CPU path needs.

megatron-core's distributed optimizer, schedules, checkpoints and datasets are device-neutral in
substance, but name CUDA in their spelling (`device="cuda"`, `torch.cuda.current_device()`, a
comparison with `'torch.cuda.FloatTensor'`). Each entry below names the site that needs it
(megatron-core 0.19.2). Nothing here is installed where CUDA exists.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
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
    """Stand in for torch.cuda.Event: on a CPU everything recorded has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        """Say that the event has happened."""
        return True

    def elapsed_time(self, _: "CpuEvent") -> float:
        """Return 0: CPU work is timed with host clocks."""
        return 0.0


class CpuStream:
    """Stand in for torch.cuda.Stream: a CPU process has one queue, its own program order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = _CPU

    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """Return an event that has happened."""
        return event or CpuEvent()

    def query(self) -> bool:
        """Say that all work is done."""
        return True


_installed = False


def install() -> None:
    """Install the replacements once; a no-op where CUDA exists."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    # megatron-core takes Adam from these wherever they are installed, and theirs needs a GPU
    # (optimizer/__init__.py:14, distrib_optimizer.py:24)
    for name in ("transformer_engine", "apex"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    _replace_cuda_calls()
    _replace_tensor_methods()
    # torch lists its factories once, for `with torch.device(...)`: it must see the real ones
    torch_device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # megatron-core wraps small functions in torch.compile (jit.py); compiling them for a CPU costs minutes.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from torch import _dynamo  # late: it is slow, and only this path needs it

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
    # tensor_parallel/random.py:303-345,490 keep the model-parallel RNG in torch.cuda's generator
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
        # clip_grads.py:174, distrib_optimizer.py:401/466/758, optimizer.py:1009/1028 compare with 'torch.cuda.…Tensor'
        named = plain_type(self, *args, **kwargs)
        return named.replace("torch.", "torch.cuda.", 1) if isinstance(named, str) else named

    tensor.type = cuda_named_type


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a tensor factory: device="cuda" means the CPU, and there is no pinned memory (rope_utils.py:62)."""

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
    """Replace the few megatron-core functions that reach for CUDA or TransformerEngine by name."""
    from megatron.core.tensor_parallel import random  # late: only after the shim is in place
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
        # token_dispatcher.py:927-943: a tensor already on the CPU stays a tensor, and gloo's
        # all_to_all rejects it as splits
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return move(tensor, as_numpy=as_numpy, record_stream=False)

    token_dispatcher.maybe_move_tensor_to_cpu = splits_as_numpy
    _patch_uneven_collectives()
    _patch_coalescing()


def _patch_uneven_collectives() -> None:
    """Gather and reduce-scatter parts of unequal length, which gloo cannot and NCCL can.

    Expert tensor parallelism over several expert-parallel ranks needs both (token_dispatcher.py:739).
    """
    from megatron.core.tensor_parallel import mappings  # late, as above

    even_gather = mappings._gather_along_first_dim
    even_scatter = mappings._reduce_scatter_along_first_dim

    def gather(part: Any, group: Any, lengths: Any = None, use_global_buffer: bool = False) -> Any:
        if group.size() == 1 or lengths is None:
            return even_gather(part, group, None, use_global_buffer)
        padded = part.new_zeros(max(lengths), *part.shape[1:])
        padded[: len(part)] = part
        everyones = [torch.empty_like(padded) for _ in lengths]
        torch.distributed.all_gather(everyones, padded, group=group)
        return torch.cat([one[:length] for one, length in zip(everyones, lengths)])

    def reduce_scatter(whole: Any, group: Any, lengths: Any = None, use_global_buffer: bool = False) -> Any:
        if group.size() == 1 or lengths is None:
            return even_scatter(whole, group, None, use_global_buffer)
        total = whole.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split([int(length) for length in lengths])[group.rank()].contiguous()

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = reduce_scatter


class _OneByOne:
    """Stand in for torch's _coalescing_manager: start each collective by itself, wait for all of them."""

    _open: "_OneByOne | None" = None

    def __init__(self, *_: Any, async_ops: bool = False, **__: Any) -> None:
        self.async_ops, self.works = async_ops, list[Any]()

    def __enter__(self) -> "_OneByOne":
        _OneByOne._open = self
        return self

    def __exit__(self, *_: object) -> None:
        _OneByOne._open = None
        if not self.async_ops:
            self.wait()

    def wait(self) -> None:
        """Wait for every collective of the group."""
        for work in self.works:
            work.wait()


def _patch_coalescing() -> None:
    """Keep collectives of several formats apart: gloo lays coalesced tensors end to end as if of one format.

    The parameters of a bf16 model's later pipeline chunks, bf16 and fp32 in one group, came back as
    garbage (param_and_grad_buffer.py:485).
    """
    from megatron.core.distributed import param_and_grad_buffer as buffers  # late, as above

    def by_itself(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def start(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            if _OneByOne._open is None:
                return collective(*args, async_op=async_op, **kwargs)
            _OneByOne._open.works.append(collective(*args, async_op=True, **kwargs))
            return None

        return start

    buffers._coalescing_manager = _OneByOne
    buffers.dist_all_gather_func = by_itself(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = by_itself(buffers.dist_reduce_scatter_func)
