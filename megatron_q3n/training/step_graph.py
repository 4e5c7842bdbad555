"""CUDA graph of a training step: the forward and backward passes of all micro-batches, captured once and replayed.

One period of layers runs nearly 600 kernels per micro-batch (counted at 4,096 tokens), which Python may launch more
slowly than a Hopper GPU executes them. The replay is one launch (gaps of 0.1 ms per period remain).

Requirements: no host synchronization and no data-dependent shape between the batch and the gradients. The MoE
dispatchers need no token counts on the host (model/moe/token_dispatcher.py), and every value that changes per step
(batch, loss scale, expert loads) is updated in place. Collectives inside the passes (tensor, context and expert
parallelism) are captured; gradients are reduced after the replay.

Without expert parallelism the number of permuted rows is always tokens × top-k. With it a rank's number of rows depends
on the routing, and the captured buffers have a fixed number: the most rows of the steps before, times
`parallel.expert_capacity_headroom`. A step in which a rank would need more is found on the device before its gradients
are reduced; it is repeated without the graph, exactly, and the next step is captured with larger buffers. No token is
dropped.

A library may break this silently: a copy from host memory during capture is repeated at every replay, from an address
that may have been freed. So every captured graph is searched for nodes that touch the host before it is used.

Reference: PyTorch, "CUDA semantics", whole-network capture.
"""

import gc
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch

from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.config.execution_plan import ExecutionPlan
from megatron_q3n.data.batch import Batch
from megatron_q3n.device.cuda_graph_nodes import find_host_nodes
from megatron_q3n.kernels.moe import fp8_experts, grouped_linear
from megatron_q3n.kernels.moe.expert_exchange import SymmetricExchange
from megatron_q3n.model.moe.router import routers_of
from megatron_q3n.model.patches import without_rng_forks

# kernels are compiled and libraries allocate in these; neither may happen during capture
_WARMUP_STEPS = 2


def uses_graph(config: RunConfig, plan: ExecutionPlan) -> bool:
    """Return whether the steps of a run are captured, which is the plan's `training_step`.

    Raises: UserError if training.cuda_graph is true and the plan cannot have it.
    """
    if config.training.cuda_graph and not plan.training_step:
        raise UserError(f"training.cuda_graph=true: {plan.training_step.reason}. Set training.cuda_graph=null.")
    return bool(plan.training_step)


class StepGraph:
    """Passes of a step as a CUDA graph: captured in the third step, replayed from then on."""

    def __init__(self, chunks: list[Any], *, required: bool, headroom: float = 1.0) -> None:
        """Prepare to capture passes of the one model chunk; if `required`, a graph that cannot be used is an error.

        `headroom`: rows of the expert exchange's static buffers over the most rows so far.
        """
        assert len(chunks) == 1
        self._required = required
        self._is_disabled = False
        self._model, self._model_config = chunks[0], chunks[0].module.config
        self._parameters = list(chunks[0].parameters())
        self._overwritten: list[torch.Tensor] = []
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batches: list[Batch] = []
        self._reports: list[dict] = []
        self._to_finalize: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        exchange = self._model_config.pass_state.expert_exchange
        self._exchange: SymmetricExchange | None = exchange if isinstance(exchange, SymmetricExchange) else None
        self._headroom, self._capacity = headroom, 0
        self.num_repeated_steps = 0

    def run(self, batches: list[Batch], run_schedule: Callable[[list[Batch]], list[dict]]) -> list[dict]:
        """Run forward and backward passes of a step's micro-batches, and reduce the gradients.

        Returns: the reports of `run_schedule`; they are overwritten by the next call.
        """
        if self._is_disabled or self._eager_steps < _WARMUP_STEPS:
            self._eager_steps += 1
            return run_schedule(batches)
        # outside of the graph, not only for speed: a replay reads the copies and cannot check that they are current
        fp8_experts.quantize_weights(self._parameters)
        if self._graph is None:
            graph = self._capture(batches, run_schedule)
            touching = find_host_nodes(graph)
            if _any_rank(bool(touching)):
                self._disable(touching or ["on another rank"])
                return run_schedule(batches)
            self._graph = graph
        for static, batch in zip(self._batches, batches, strict=True):
            _copy(batch, static)
        self._graph.replay()
        if self._overflows():
            return self._repeat(batches, run_schedule)
        # the replayed kernels overwrote these gradients, without the Python code that marks them
        grouped_linear.mark_accumulate(self._overwritten)
        positional, named = self._to_finalize
        self._model_config.finalize_model_grads_func(*positional, **named)
        return self._reports

    def _capture(self, batches: list[Batch], run_schedule: Callable[[list[Batch]], list[dict]]) -> torch.cuda.CUDAGraph:
        device = torch.cuda.current_device()
        self._batches = [_own_copy(batch, device) for batch in batches]
        torch.cuda.synchronize()
        gc.collect()
        # the graph has its own memory pool; the warm-up's memory becomes free for it
        torch.cuda.empty_cache()
        # kept, so that its nodes can be searched
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        stale = [p for p in self._parameters if grouped_linear.overwrites_main_grad(p)]
        finalize = self._model_config.finalize_model_grads_func
        self._model_config.finalize_model_grads_func = self._record_finalize
        # on the stream on which the model was built: autograd accumulates a leaf's gradient on the stream of the leaf's
        # hook. Other threads (a save in the background) may use the GPU meanwhile.
        stream = torch.cuda.current_stream()
        _drop_dense_copies(self._model)
        try:
            forks = without_rng_forks()
            with self._static_rows(), forks, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._reports = run_schedule(self._batches)
        except RuntimeError as error:
            raise UserError(
                f"a step's passes could not be captured as a CUDA graph ({str(error).splitlines()[0]}). Set "
                "training.cuda_graph=false, and report this as a bug."
            ) from error
        finally:
            self._model_config.finalize_model_grads_func = finalize
            _drop_dense_copies(self._model)
        self._overwritten = [p for p in stale if not grouped_linear.overwrites_main_grad(p)]
        return graph

    def _static_rows(self) -> AbstractContextManager[None]:
        """Return the context in which the expert exchange has a fixed number of rows, the same on every rank."""
        if self._exchange is None:
            return nullcontext()
        self._capacity = math.ceil(self._most_rows() * self._headroom)
        return self._exchange.static_capacity(self._capacity)

    def _most_rows(self) -> int:
        """Return the most rows that any rank has had in one dispatch so far. A collective call; the host waits."""
        assert self._exchange is not None
        rows = self._exchange.peak_rows.clone()
        torch.distributed.all_reduce(rows, op=torch.distributed.ReduceOp.MAX)
        return int(rows.item())

    def _overflows(self) -> bool:
        """Return whether a rank had more rows in the replayed step than its buffers hold; the same on every rank."""
        return self._exchange is not None and self._most_rows() > self._capacity

    def _repeat(self, batches: list[Batch], run_schedule: Callable[[list[Batch]], list[dict]]) -> list[dict]:
        """Discard everything that the replayed passes accumulated, and run them again exactly, without the graph."""
        self.num_repeated_steps += 1
        warnings.warn(
            f"step repeated without its CUDA graph: a rank needed {self._most_rows():,} rows of expert input, and the "
            f"captured buffers hold {self._capacity:,}. They grow in the next step. If it happens often, raise "
            f"parallel.expert_capacity_headroom ({self._headroom:g}).",
            stacklevel=2,
        )
        self._graph, self._batches, self._reports = None, [], []
        self._model.zero_grad_buffer()
        for router in routers_of([self._model.module]).values():
            router.reset_counts()
        if self._model_config.pass_state.mtp is not None:
            self._model_config.pass_state.mtp.pop_totals()
        return run_schedule(batches)

    def _disable(self, touching: list[str]) -> None:
        what = f"a captured step holds {len(touching)} nodes that touch the host ({', '.join(sorted(set(touching)))})"
        if self._required:
            raise UserError(
                f"training.cuda_graph=true: {what}, so its replays would read freed host memory. Set "
                "training.cuda_graph=null; tools/benchmarks/LOG.md describes the one known case."
            )
        warnings.warn(f"steps run without a CUDA graph: {what}", stacklevel=2)
        self._is_disabled = True
        self._batches, self._reports = [], []
        # capturing marked them, but no kernel ran
        grouped_linear.mark_overwrite(self._overwritten)
        self._overwritten = []

    def _record_finalize(self, *positional: Any, **named: Any) -> None:
        self._to_finalize = (positional, named)


def _any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank: all must replay, or none. A collective call; the host waits."""
    flags = torch.tensor([float(flag)], device=torch.cuda.current_device())
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags.item())


def _drop_dense_copies(model: Any) -> None:
    """Drop TransformerEngine's FP8 copies of dense weights, so that the graph creates its own in its memory pool.

    An evaluation frees the transposed half of existing copies (TransformerEngine 2.20, quantizer.cpp,
    convert_and_update_tensor), and replays would then write to memory of other tensors.
    """
    for module in model.modules():
        copies = getattr(module, "_fp8_workspaces", None)
        if copies:
            copies.clear()


def _own_copy(batch: Batch, device: Any) -> Batch:
    """Copy a batch to the device, also if it is there already, since the caller may reuse its memory."""
    tensors = {
        field.name: getattr(batch, field.name).to(device).clone()
        for field in fields(Batch)
        if isinstance(getattr(batch, field.name), torch.Tensor)
    }
    return replace(batch, **tensors)


def _copy(source: Batch, target: Batch) -> None:
    assert source.packing is None, "packed batches differ in shape; the plan excludes them"
    for field in fields(Batch):
        value = getattr(source, field.name)
        if isinstance(value, torch.Tensor):
            getattr(target, field.name).copy_(value, non_blocking=True)
