"""CUDA graph of a training step: the forward and backward passes of all micro-batches, captured once and replayed.

One period of layers runs nearly 600 kernels per micro-batch (counted at 4,096 tokens), which Python may launch more
slowly than a Hopper GPU executes them. The replay is one launch (gaps of 0.1 ms per period remain).

Requirements: no host synchronization and no data-dependent shape between the batch and the gradients. The MoE
dispatchers need no token counts on the host (model/moe/token_dispatcher.py), and every value that changes per step
(batch, loss scale, expert loads) is updated in place. Collectives inside the passes (tensor, context and expert
parallelism) are captured; gradients are reduced after the replay.

Without expert parallelism the number of permuted rows is always tokens × top-k. With it a rank's number of rows depends
on the routing, and the captured buffers have a fixed number (exchange_capacity.py). A step in which a rank would need
more is found before its gradients are reduced: the host waits for the replay and reads the largest number of all ranks.
Such a step is repeated without the graph, exactly, and the next one is captured with larger buffers. No token is
dropped.

A library may break this silently: a copy from host memory during capture is repeated at every replay, from an address
that may have been freed. So every captured graph is searched for nodes that touch the host before it is used.

Reference: PyTorch, "CUDA semantics", whole-network capture.
"""

import gc
import warnings
from collections.abc import Callable
from contextlib import nullcontext
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
from megatron_q3n.training.exchange_capacity import ExchangeCapacity

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
        is_symmetric = isinstance(exchange, SymmetricExchange)
        self._capacity = ExchangeCapacity(exchange, headroom) if is_symmetric else None
        self.num_repeated_steps = 0

    @property
    def is_captured(self) -> bool:
        """Whether steps are replayed now."""
        return self._graph is not None

    def run(self, batches: list[Batch], run_schedule: Callable[[list[Batch]], list[dict]]) -> list[dict]:
        """Run forward and backward passes of a step's micro-batches, and reduce the gradients.

        Returns: the reports of `run_schedule`; they are overwritten by the next call.
        """
        if self._is_disabled:
            return run_schedule(batches)
        if self._eager_steps < _WARMUP_STEPS:
            self._eager_steps += 1
            return self._run_exactly(batches, run_schedule)
        # outside of the graph, not only for speed: a replay reads the copies and cannot check that they are current
        fp8_experts.quantize_weights(self._parameters)
        if self._graph is None:
            graph, problems = self._capture(batches, run_schedule)
            if _any_rank(bool(problems)):
                self._disable(problems or ["on another rank"])
                return run_schedule(batches)
            self._graph = graph
        assert self._graph is not None
        for static, batch in zip(self._batches, batches, strict=True):
            _copy(batch, static)
        if self._capacity is not None:
            self._capacity.reset()
        self._graph.replay()
        if self._capacity is not None and (rows := self._capacity.rows_needed()) > self._capacity.rows:
            return self._repeat(batches, run_schedule, rows)
        # the replayed kernels overwrote these gradients, without the Python code that marks them
        grouped_linear.mark_accumulate(self._overwritten)
        positional, named = self._to_finalize
        self._model_config.finalize_model_grads_func(*positional, **named)
        return self._reports

    def _run_exactly(self, batches: list[Batch], run_schedule: Callable[[list[Batch]], list[dict]]) -> list[dict]:
        """Run the passes without a graph, counting the rows that each rank's experts get."""
        with nullcontext() if self._capacity is None else self._capacity.counting():
            return run_schedule(batches)

    def _capture(
        self, batches: list[Batch], run_schedule: Callable[[list[Batch]], list[dict]]
    ) -> tuple[torch.cuda.CUDAGraph, list[str]]:
        """Capture the passes. Returns: the graph, and why it cannot be used."""
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
        capturing = torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local")
        static_rows = nullcontext() if self._capacity is None else self._capacity.static()
        _drop_dense_copies(self._model)
        problems: list[str] = []
        try:
            with static_rows, without_rng_forks(), capturing:
                self._reports = run_schedule(self._batches)
        except RuntimeError as error:
            problems = [f"it could not be captured: {str(error).splitlines()[0]}"]
        finally:
            self._model_config.finalize_model_grads_func = finalize
            _drop_dense_copies(self._model)
        self._overwritten = [p for p in stale if not grouped_linear.overwrites_main_grad(p)]
        return graph, problems or find_host_nodes(graph)

    def _repeat(self, batches: list[Batch], run_schedule: Callable[[list[Batch]], list[dict]], rows: int) -> list[dict]:
        """Discard everything that the replayed passes accumulated, and run them again exactly, without the graph."""
        assert self._capacity is not None
        self.num_repeated_steps += 1
        warnings.warn(
            f"step repeated without its CUDA graph: a rank needed {rows:,} rows of expert input, and the captured "
            f"buffers hold {self._capacity.rows:,}. They grow in the next step. If it happens often, raise "
            f"parallel.expert_capacity_headroom ({self._capacity.headroom:g}).",
            stacklevel=2,
        )
        self._graph, self._batches, self._reports = None, [], []
        self._discard_passes()
        for router in routers_of([self._model.module]).values():
            router.reset_counts()
        if self._model_config.pass_state.mtp is not None:
            self._model_config.pass_state.mtp.pop_totals()
        return self._run_exactly(batches, run_schedule)

    def _discard_passes(self) -> None:
        """Clear the gradients and DDP's record of them, as at the start of a step."""
        self._model.zero_grad_buffer()

    def _disable(self, problems: list[str]) -> None:
        what = f"a captured step touches the host or failed ({len(problems)}: {', '.join(sorted(set(problems)))})"
        if self._required:
            raise UserError(
                f"training.cuda_graph=true: {what}; its replays would read freed host memory. Set "
                "training.cuda_graph=null; tools/benchmarks/LOG.md describes the one known case."
            )
        warnings.warn(f"steps run without a CUDA graph: {what}", stacklevel=2)
        self._is_disabled = True
        self._batches, self._reports, self._overwritten = [], [], []
        # capturing marked gradients as written, but no kernel ran
        self._discard_passes()

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
