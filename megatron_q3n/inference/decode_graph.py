"""Rounds as CUDA graphs: what a round launches, some hundreds of kernels, is launched by one call.

At a batch of one a round is a millisecond of work for a GPU, and Python takes ten times as long to
start it. A graph is captured once for a number of rows and a room of positions, over buffers of its
own, into which sequences are copied when they come and where they stay while they run. Rows are
rounded up to a power of two, the rest being padding that nobody reads; positions are rounded up too,
and keys behind a sequence's length are masked, so one graph serves many lengths. Graphs are kept with
the model and serve later calls, as long as its weights lie where they lay.

What stands against it: another rank's share in a pass (collectives are not captured), someone who
listens to the routers, and experts that ask the host for counts.

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
from megatron_q3n.device.graph_nodes import nodes_that_touch_the_host, num_nodes
from megatron_q3n.inference.decode_step import Rounds, Running
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.model.decode.experts import wait_for_nobody
from megatron_q3n.model.decode.state import KeyValueCache

_WARMUP_ROUNDS = 2  # kernels compile and libraries allocate; neither may happen during capture
_MOST_GRAPHS = 8  # of one model; each has buffers of its own
_LEAST_POSITIONS = 256
_Key = tuple[Any, ...]


class Room:
    """Buffers for a round of so many rows and positions, who lies in them, and the round, captured or not."""

    def __init__(self, rounds: Rounds, rows: int, positions: int) -> None:
        # beyond `positions` padding may grow: it counts itself on with every round
        self._rounds, self._slack = rounds, rounds.reach(0)
        self._capacity = positions + 2 * self._slack
        self._home = rounds.nobody(rows)
        drafting = self._home.state.mtp if rounds.depth else []
        for memory in (*self._home.state.layers, *drafting):
            if isinstance(memory, KeyValueCache):
                memory.resize(self._capacity)
        self._home.state.lengths = [0] * rows
        device = rounds.passes.device
        self._uniform_NU = torch.zeros(rows, rounds.numbers, dtype=torch.float64, device=device)
        self._resident: weakref.ref[Running] | None = None
        self.num_launches = 0  # what one replay replaces, once captured

    def _round(self) -> Tensor:
        """Run a round on all rows."""
        packed = self._rounds.take_on(self._home, self._uniform_NU, self._capacity)
        self._home.length_N.clamp_(max=self._capacity - self._slack)
        return packed

    def capture(self) -> None:
        """Replay the round from now on.

        Raises: RuntimeError if the capture fails or touches the host.
        """
        device = self._rounds.passes.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARMUP_ROUNDS):
                self._round()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph(keep_graph=True)  # to look at its nodes
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            packed = self._round()
        touching = nodes_that_touch_the_host(graph)
        if touching:
            raise RuntimeError(f"it touches the host: {', '.join(sorted(set(touching)))}")
        self.num_launches = num_nodes(graph)

        def replay() -> Tensor:
            graph.replay()
            return packed

        self._round = replay  # type: ignore[method-assign]
        del self._rounds  # nothing here holds the model, by which graphs are kept

    def take_on(self, running: Running, uniform_NU: Tensor) -> tuple[Running, Tensor]:
        """Run the round on these sequences. Returns: they, in these buffers; and packed."""
        if self._resident is None or self._resident() is not running:
            running = self._move_in(running)
        rows = len(running.last_N)
        if self._uniform_NU.shape[1]:
            self._uniform_NU[:rows].copy_(uniform_NU, non_blocking=True)
        return running, self._round()[:rows]

    def _move_in(self, running: Running) -> Running:
        """Copy sequences into the buffers. Returns: views of these."""
        self.let_go()
        rows = len(running.last_N)
        for kept, new in zip(self._home.tensors(), running.tensors(), strict=True):
            kept.zero_()
            kept[:rows].copy_(new)
        self._home.state.take(running.state)
        inside = Running(self._home.state.first(rows, running.state.lengths), *(x[:rows] for x in self._home.tensors()))
        self._resident = weakref.ref(inside)
        return inside

    def let_go(self) -> None:
        """Give who lies in the buffers memory of their own, if they are still about."""
        old = None if self._resident is None else self._resident()
        if old is not None:
            old.own()
        self._resident = None


class RoundGraphs:
    """Takes sequences on, by a graph where `wanted` and possible.

    `wanted`: True must have it, None has it where nothing stands against it, False goes without.
    `obstacle` says why not, once known.
    """

    def __init__(self, rounds: Rounds, wanted: bool | None) -> None:
        """Raises: UserError if graphs must be had and cannot."""
        self._rounds, self._wanted = rounds, wanted
        self.obstacle = "not asked for" if wanted is False else obstacle(rounds)
        if wanted and self.obstacle:
            raise UserError(f"inference.cuda_graph=true: {self.obstacle}. Set inference.cuda_graph=null.")
        self._fits: dict[int, bool] = {}
        self.num_launches: int | None = None  # of the last replayed round
        self._kept = _graphs_of(rounds.passes.model) if self.obstacle is None else OrderedDict()

    def take_on(self, running: Running, uniform_NU: Tensor, longest: int) -> tuple[Running, Tensor]:
        """Run a round; `longest` is what the longest sequence may grow to.

        Returns: the sequences, which may lie elsewhere now; and packed, see `Rounds.take_on`.
        """
        rows = 1 << (len(running.last_N) - 1).bit_length()
        if rows not in self._fits:
            self._fits[rows] = self.obstacle is None and self._experts_fit(rows)
        if self.obstacle is None and self._fits[rows]:
            room = self._room(rows, room_for(self._rounds.reach(longest)))
            if room is not None:
                self.num_launches = room.num_launches
                return room.take_on(running, uniform_NU)
        reach = self._rounds.reach(max(running.state.lengths))
        return running, self._rounds.take_on(running, uniform_NU, reach)

    def _experts_fit(self, rows: int) -> bool:
        """Whether experts of so many rows ask the host for nothing."""
        layers = self._rounds.passes.model.decoder.layers
        mixtures = [x.mlp for x in layers if isinstance(x.mlp, MoELayer)]
        return all(wait_for_nobody(moe, rows * self._rounds.tokens) for moe in mixtures)

    def _room(self, rows: int, positions: int) -> Room | None:
        sampling, depth = self._rounds.sampling, self._rounds.depth
        key = (rows, positions, depth, _drawing(sampling))
        graph = self._kept.get(key)
        if graph is None:
            while len(self._kept) >= _MOST_GRAPHS:
                _, oldest = self._kept.popitem(last=False)
                oldest.let_go()
            try:
                graph = self._build(rows, positions)
            except RuntimeError as error:
                self._give_up(str(error).splitlines()[0])
                return None
            self._kept[key] = graph
        self._kept.move_to_end(key)
        return graph

    def _build(self, rows: int, positions: int) -> Room:
        room = Room(self._rounds, rows, positions)
        room.capture()
        return room

    def _give_up(self, problem: str) -> None:
        what = f"a round could not be captured as a CUDA graph ({problem})"
        if self._wanted:
            raise UserError(f"inference.cuda_graph=true: {what}. Set inference.cuda_graph=null.")
        warnings.warn(f"generation goes on without CUDA graphs: {what}", stacklevel=2)
        self.obstacle = what


_kept: weakref.WeakKeyDictionary[Any, tuple[list[int], OrderedDict[_Key, Room]]] = weakref.WeakKeyDictionary()


def _graphs_of(model: Any) -> OrderedDict[_Key, Room]:
    """Return the graphs kept for a model; none if its weights have moved since."""
    places = [parameter.data_ptr() for parameter in model.parameters()]
    known = _kept.get(model)
    if known is None or known[0] != places:
        known = (places, OrderedDict())
        _kept[model] = known
    return known[1]


def forget(model: Any) -> None:
    """Free a model's graphs and their buffers."""
    _kept.pop(model, None)


def obstacle(rounds: Rounds) -> str | None:
    """Say what stands against graphs of a model's rounds, if anything does."""
    model, passes = rounds.passes.model, rounds.passes
    if passes.device.type != "cuda":
        return "there is no GPU"
    if not passes.is_alone:
        return "ranks exchange tokens or activations inside a pass"
    if any(getattr(module, "tape", None) is not None for module in model.modules()):
        return "someone records or replays what the model's layers do"
    return None


def room_for(positions: int) -> int:
    """Round a number of positions up by at most a quarter, so that few graphs serve many lengths."""
    positions = max(positions, _LEAST_POSITIONS)
    step = 1 << max(0, math.ceil(math.log2(positions)) - 3)
    return -(-positions // step) * step


def _drawing(sampling: Sampling) -> _Key:
    """Return what of the sampling is built into a round."""
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.vocab_size
