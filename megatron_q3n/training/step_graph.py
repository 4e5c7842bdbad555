"""A step's forward and backward passes as one CUDA graph.

One period of a micro-batch is nearly 600 kernels (counted at 4,096 tokens), which Python may start more
slowly than a Hopper GPU finishes them. Captured once and replayed, they are one launch (gaps of 0.1 ms a
period there).

What makes it possible: nothing between the batch and the gradients waits for the GPU or has a shape
that depends on data. Experts are reached without host counts (model/moe/token_dispatcher.py), rows that go to
them are always tokens × top-k, and every number that changes per step (batch, loss scale, expert
loads) lies where it lay when the graph was captured. Collectives are not captured: a layout that
needs some inside its passes does without a graph, and gradients are reduced after the replay.

A library may break this unseen: what it copies from the host while its kernels are captured is read
again at every replay, from memory that is long somebody else's. So every captured graph is searched for
nodes that touch the host before it is used.

Reference: PyTorch, "CUDA semantics", whole-network capture.
"""

import gc
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.data.batch import Batch
from megatron_q3n.device.graph_nodes import nodes_that_touch_the_host
from megatron_q3n.kernels import registry
from megatron_q3n.kernels.gated_delta import backend as delta_rule_backend
from megatron_q3n.kernels.moe import fp8_experts, grouped_linear, permutation

MUST_BE_FUSED = (delta_rule_backend.OPERATION, permutation.OPERATION, grouped_linear.OPERATION)
_WARMUP_STEPS = 2  # kernels compile and libraries allocate; neither may happen during capture


def uses_graph(config: RunConfig, is_cuda: bool) -> bool:
    """Whether a run's steps become graphs: where training.cuda_graph asks for it, or leaves it open and nothing stands
    against it.

    Raises: UserError if it asks and the kernels here cannot.
    """
    if not is_cuda:
        return False
    obstacle = _obstacle(config)
    if config.training.cuda_graph and obstacle:
        raise UserError(f"training.cuda_graph=true: {obstacle}. Set training.cuda_graph=null.")
    return config.training.cuda_graph is not False and obstacle is None


def verdict(config: RunConfig) -> str:
    """Say whether steps are graphs, and why not; for environment.json."""
    if config.training.cuda_graph is False:
        return "no: training.cuda_graph=false"
    obstacle = _obstacle(config)
    if obstacle:
        return f"no: {obstacle}"
    return "from the third step on, unless its capture touches the host: then the log says so"


def _obstacle(config: RunConfig) -> str | None:
    lacking = registry.lacking(MUST_BE_FUSED)
    if lacking:
        return f"{lacking[0]} runs as its torch reference here, which waits for the GPU (environment.json says why)"
    return config.graph_obstacle()


class StepGraph:
    """Captures the third step's passes, and replays them from then on."""

    def __init__(self, chunks: list[Any], *, required: bool) -> None:
        """Take the model; `required`: a graph that cannot be had is an error, not a reason to go on without."""
        assert len(chunks) == 1
        self._required = required
        self._given_up = False
        self._model, self._hooks = chunks[0], chunks[0].module.config
        self._parameters = list(chunks[0].parameters())
        self._overwritten: list[torch.Tensor] = []
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batches: list[Batch] = []
        self._reports: list[dict] = []
        self._to_finalize: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def run(self, batches: list[Batch], run_schedule: Callable[[list[Batch]], list[dict]]) -> list[dict]:
        """Run forward and backward passes of a step's micro-batches, and reduce the gradients.

        Returns: the reports of `run_schedule`; they are overwritten by the next call.
        """
        if self._given_up or self._eager_steps < _WARMUP_STEPS:
            self._eager_steps += 1
            return run_schedule(batches)
        # outside the graph, and not only for speed: a replay reads the copies and cannot ask whether they are current
        fp8_experts.quantise(self._parameters)
        if self._graph is None:
            graph = self._capture(batches, run_schedule)
            touching = nodes_that_touch_the_host(graph)
            if touching:
                self._give_up(touching)
                return run_schedule(batches)
            self._graph = graph
        for static, batch in zip(self._batches, batches, strict=True):
            _copy(batch, static)
        self._graph.replay()
        grouped_linear.mark_fresh(self._overwritten)  # the kernels did; Python was not there to note it
        positional, named = self._to_finalize
        self._hooks.finalize_model_grads_func(*positional, **named)
        return self._reports

    def _capture(self, batches: list[Batch], run_schedule: Callable[[list[Batch]], list[dict]]) -> torch.cuda.CUDAGraph:
        device = torch.cuda.current_device()
        self._batches = [_own_copy(batch, device) for batch in batches]
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()  # the graph has a pool of its own; the warm-up's memory becomes free for it
        graph = torch.cuda.CUDAGraph(keep_graph=True)  # to look at its nodes
        stale = [p for p in self._parameters if grouped_linear.is_stale(p)]
        finalize = self._hooks.finalize_model_grads_func
        self._hooks.finalize_model_grads_func = self._remember
        # on the stream that everything was built on: autograd adds a leaf's gradient on the stream the leaf's hook
        # was made on. Other threads (a save under way) may go on using the GPU.
        stream = torch.cuda.current_stream()
        _drop_dense_copies(self._model)
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._reports = run_schedule(self._batches)
        except RuntimeError as error:
            raise UserError(
                f"a step's passes could not be captured as a CUDA graph ({str(error).splitlines()[0]}). Set "
                "training.cuda_graph=false, and tell the project's developers."
            ) from error
        finally:
            self._hooks.finalize_model_grads_func = finalize
            _drop_dense_copies(self._model)
        self._overwritten = [p for p in stale if not grouped_linear.is_stale(p)]
        return graph

    def _give_up(self, touching: list[str]) -> None:
        what = f"a captured step holds {len(touching)} nodes that touch the host ({', '.join(sorted(set(touching)))})"
        if self._required:
            raise UserError(
                f"training.cuda_graph=true: {what}, so its replays would compute with garbage. Set "
                "training.cuda_graph=null; tools/benchmarks/LOG.md tells of the one known case."
            )
        warnings.warn(f"steps run without a CUDA graph: {what}", stacklevel=2)
        self._given_up = True
        self._batches, self._reports = [], []
        grouped_linear.mark_stale(self._overwritten)  # nothing ran
        self._overwritten = []

    def _remember(self, *positional: Any, **named: Any) -> None:
        self._to_finalize = (positional, named)


def _drop_dense_copies(model: Any) -> None:
    """Let go of TransformerEngine's FP8 copies of dense weights: a graph must have its own, in its own memory.

    An evaluation drops the transposed half of those it finds (TransformerEngine 2.20, quantizer.cpp,
    convert_and_update_tensor), and replays would write where somebody else's tensors lie by then.
    """
    for module in model.modules():
        copies = getattr(module, "_fp8_workspaces", None)
        if copies:
            copies.clear()


def _own_copy(batch: Batch, device: Any) -> Batch:
    """Copy a batch to the device; also one that is there, since its memory is the caller's."""
    tensors = {
        field.name: getattr(batch, field.name).to(device).clone()
        for field in fields(Batch)
        if isinstance(getattr(batch, field.name), torch.Tensor)
    }
    return replace(batch, **tensors)


def _copy(source: Batch, target: Batch) -> None:
    assert source.cu_seqlens is None, "packed batches differ in shape; the configuration says no"
    for field in fields(Batch):
        value = getattr(source, field.name)
        if isinstance(value, torch.Tensor):
            getattr(target, field.name).copy_(value, non_blocking=True)
