"""CUDA graphs of decode steps: one call launches the several hundred kernels of a step.

At a batch size of one a decode step is about a millisecond of GPU work, and Python needs ten times as long to launch
it. A graph is captured once for a number of rows and a capacity in positions, over static buffers. Sequences are copied
into the buffers when they are admitted, and stay there while they run. The number of rows is padded to a power of two,
the capacity is rounded up too, and keys past a sequence's length are masked, so that one graph serves many lengths.
Graphs are cached for each model and reused by later calls, as long as the model's weights keep their addresses.

Graphs are not possible where other ranks take part in a pass (collectives are not captured), where routing or the delta
rule is recorded or replayed, or where the experts need a host synchronization.

Shapes: as in decode_step.py.
"""

import math
import warnings
import weakref
from collections import OrderedDict
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_q3n.config import UserError
from megatron_q3n.device.cuda_graph_nodes import find_host_nodes, num_nodes
from megatron_q3n.inference.decode_step import DecodeStep, RunningBatch
from megatron_q3n.inference.mixed_sampling import MixedSampling
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.model.decode.experts import runs_without_host_sync
from megatron_q3n.model.decode.protocols import DecodeModel
from megatron_q3n.model.decode.state import KVCache

# kernels compile and libraries allocate during these; neither may happen during capture
_NUM_WARMUP_STEPS = 2
# of one model; each has its own buffers
_MAX_GRAPHS = 8
_MIN_POSITIONS = 256
_Key = tuple[Any, ...]


class GraphBuffers:
    """Static buffers for a decode step of fixed numbers of rows and positions, and the step, captured or not."""

    def __init__(self, step: DecodeStep, num_rows: int, num_positions: int) -> None:
        # the lengths of padding rows grow with every step too, so leave a margin above `num_positions`
        self._step, self._margin = step, step.max_end(0)
        self._capacity = num_positions + 2 * self._margin
        self._buffers = step.empty_batch(num_rows)
        mtp = self._buffers.state.mtp if step.depth else []
        for layer_state in (*self._buffers.state.layers, *mtp):
            if isinstance(layer_state, KVCache):
                layer_state.resize(self._capacity)
        self._buffers.state.lengths = [0] * num_rows
        device = step.runner.device
        self._uniform_NU = torch.zeros(num_rows, step.num_random, dtype=torch.float64, device=device)
        self._resident: weakref.ref[RunningBatch] | None = None
        # kernel launches that one replay replaces; 0 before the capture
        self.num_launches = 0

    def _run_step(self) -> Tensor:
        """Run the decode step on all rows."""
        packed = self._step.run(self._buffers, self._uniform_NU, self._capacity)
        self._buffers.length_N.clamp_(max=self._capacity - self._margin)
        return packed

    def capture(self) -> None:
        """Capture the step; later calls of `run` replay it.

        Raises: RuntimeError if the capture fails or contains host nodes.
        """
        device = self._step.runner.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_NUM_WARMUP_STEPS):
                self._run_step()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        # keep_graph: to inspect its nodes
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            packed = self._run_step()
        host_nodes = find_host_nodes(graph)
        if host_nodes:
            raise RuntimeError(f"it touches the host: {', '.join(sorted(set(host_nodes)))}")
        self.num_launches = num_nodes(graph)

        def replay() -> Tensor:
            graph.replay()
            return packed

        self._run_step = replay  # type: ignore[method-assign]
        # the cache of graphs is keyed weakly by the model, so no graph may hold a reference to it
        del self._step

    def run(self, batch: RunningBatch, uniform_NU: Tensor) -> tuple[RunningBatch, Tensor]:
        """Run the decode step on a batch. Returns: the batch as views of the buffers; and packed."""
        if self._resident is None or self._resident() is not batch:
            batch = self._load(batch)
        num_rows = len(batch.last_token_N)
        if self._uniform_NU.shape[1]:
            self._uniform_NU[:num_rows].copy_(uniform_NU, non_blocking=True)
        return batch, self._run_step()[:num_rows]

    def _load(self, batch: RunningBatch) -> RunningBatch:
        """Copy a batch into the buffers. Returns: views of them."""
        self.evict()
        num_rows = len(batch.last_token_N)
        for buffer, new in zip(self._buffers.tensors(), batch.tensors(), strict=True):
            buffer.zero_()
            buffer[:num_rows].copy_(new)
        self._buffers.state.copy_from(batch.state)
        state = self._buffers.state.view_of_first(num_rows, batch.state.lengths)
        loaded = RunningBatch(state, *(x[:num_rows] for x in self._buffers.tensors()))
        self._resident = weakref.ref(loaded)
        return loaded

    def evict(self) -> None:
        """Free the buffers: copy the tensors of the batch in them, if it is still referenced."""
        resident = None if self._resident is None else self._resident()
        if resident is not None:
            resident.clone_tensors()
        self._resident = None


class DecodeGraphs:
    """Decode steps, replayed as CUDA graphs where requested and possible.

    `requested`: True requires graphs, None uses them where possible, False disables them. `obstacle` is the reason why
    they are not used, if known.
    """

    def __init__(self, step: DecodeStep, requested: bool | None) -> None:
        """Raises: UserError if graphs are required and not possible."""
        self._step, self._requested = step, requested
        self.obstacle = "not requested" if requested is False else obstacle(step)
        if requested and self.obstacle:
            raise UserError(f"inference.cuda_graph=true: {self.obstacle}. Set inference.cuda_graph=null.")
        self._is_capturable: dict[int, bool] = {}
        # kernel launches of the last replayed step
        self.num_launches: int | None = None
        self._graphs = _graphs_of(step.runner.model) if self.obstacle is None else OrderedDict()

    def run(self, batch: RunningBatch, uniform_NU: Tensor, longest: int) -> tuple[RunningBatch, Tensor]:
        """Run a decode step; `longest` is the largest final length of a sequence.

        Returns: the batch, whose tensors may be others; and packed, as `DecodeStep.run`.
        """
        num_rows = 1 << (len(batch.last_token_N) - 1).bit_length()
        if num_rows not in self._is_capturable:
            self._is_capturable[num_rows] = self.obstacle is None and self._runs_without_host_sync(num_rows)
        if self.obstacle is None and self._is_capturable[num_rows]:
            buffers = self._get_buffers(num_rows, round_up_positions(self._step.max_end(longest)))
            if buffers is not None:
                self.num_launches = buffers.num_launches
                return buffers.run(batch, uniform_NU)
        max_end = self._step.max_end(max(batch.state.lengths))
        return batch, self._step.run(batch, uniform_NU, max_end)

    def _runs_without_host_sync(self, num_rows: int) -> bool:
        """Return whether the experts run this many rows without host synchronization."""
        layers = self._step.runner.model.decoder.layers
        moe_layers = [x.mlp for x in layers if isinstance(x.mlp, MoELayer)]
        return all(runs_without_host_sync(moe, num_rows * self._step.tokens_per_sequence) for moe in moe_layers)

    def _get_buffers(self, num_rows: int, num_positions: int) -> GraphBuffers | None:
        """Return a cached or new graph; None if the capture failed."""
        key = (num_rows, num_positions, self._step.depth, _sampling_key(self._step.sampling))
        graph = self._graphs.get(key)
        if graph is None:
            while len(self._graphs) >= _MAX_GRAPHS:
                _, oldest = self._graphs.popitem(last=False)
                oldest.evict()
            try:
                graph = self._build(num_rows, num_positions)
            except RuntimeError as error:
                self._disable(str(error).splitlines()[0])
                return None
            self._graphs[key] = graph
        self._graphs.move_to_end(key)
        return graph

    def _build(self, num_rows: int, num_positions: int) -> GraphBuffers:
        buffers = GraphBuffers(self._step, num_rows, num_positions)
        buffers.capture()
        return buffers

    def _disable(self, reason: str) -> None:
        problem = f"a decode step could not be captured as a CUDA graph ({reason})"
        if self._requested:
            raise UserError(f"inference.cuda_graph=true: {problem}. Set inference.cuda_graph=null.")
        warnings.warn(f"generation continues without CUDA graphs: {problem}", stacklevel=2)
        self.obstacle = problem


_graphs_by_model: weakref.WeakKeyDictionary[Any, tuple[list[int], OrderedDict[_Key, GraphBuffers]]] = (
    weakref.WeakKeyDictionary()
)


def _graphs_of(model: DecodeModel) -> OrderedDict[_Key, GraphBuffers]:
    """Return the graphs cached for a model; none if its weights have other addresses than at capture."""
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    cached = _graphs_by_model.get(model)
    if cached is None or cached[0] != addresses:
        cached = (addresses, OrderedDict())
        _graphs_by_model[model] = cached
    return cached[1]


def free_graphs(model: DecodeModel) -> None:
    """Free a model's cached graphs and their buffers."""
    _graphs_by_model.pop(model, None)


def obstacle(step: DecodeStep) -> str | None:
    """Return why a model's decode steps cannot be CUDA graphs, or None."""
    config = step.runner.model.config
    if isinstance(step.sampling, MixedSampling):
        return "each sequence has sampling parameters of its own"
    if not config.plan.decode.cuda_graph:
        return config.plan.decode.cuda_graph.reason
    if config.pass_state.is_observed:
        return "routes or delta rules of the model's layers are recorded or replayed"
    return None


def round_up_positions(positions: int) -> int:
    """Round a number of positions up by at most a quarter, so that few graphs serve many lengths."""
    positions = max(positions, _MIN_POSITIONS)
    step = 1 << max(0, math.ceil(math.log2(positions)) - 3)
    return -(-positions // step) * step


def _sampling_key(sampling: Sampling | MixedSampling) -> _Key:
    """Return the sampling parameters that are constants of a captured step."""
    assert isinstance(sampling, Sampling), "mixed sampling is an obstacle"
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.vocab_size
