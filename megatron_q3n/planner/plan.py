"""Memory plan of a run: bytes on every pipeline rank, compared with a GPU's memory.

Ranks of one pipeline stage need the same (a margin for expert imbalance covers the fullest of them), so a plan has one
entry per stage. The estimate covers tensors; CUDA context, NCCL buffers, workspaces and fragmentation are covered by a
GPU's `reserve_gib`.
"""

from dataclasses import dataclass

import psutil

from megatron_q3n.config import RunConfig
from megatron_q3n.config.sizes import FlopCount, ParameterCount, flops_per_token, parameters, pipeline_segments
from megatron_q3n.planner.recompute import ActivationMemory, last_stage_memory, segment_memory
from megatron_q3n.planner.schedule import in_flight
from megatron_q3n.planner.states import LocalParameters, StateBytes, local_parameters, state_bytes

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Memory of a GPU; `reserve_gib` of it is not available for tensors."""

    name: str
    memory_gib: float
    reserve_gib: float = 4.0

    @property
    def usable_gib(self) -> float:
        """Return the memory left for tensors."""
        return self.memory_gib - self.reserve_gib


H100 = Gpu("H100 80 GB", 80e9 / GIB)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of one pipeline stage."""

    rank: int
    segments: tuple[str, ...]
    """Sublayers of each model chunk, as megatron-core's symbols."""
    in_flight: tuple[int, ...]
    """Micro-batches in flight at the memory peak, per model chunk."""
    parameters: LocalParameters
    states: StateBytes
    activations: float
    backward_bytes: float
    """Transient and recomputed tensors of the one sublayer in its backward pass."""

    @property
    def num_sublayers(self) -> int:
        """Return the stage's megatron-core layers, MTP excepted."""
        return sum(len(segment) for segment in self.segments)

    @property
    def total(self) -> float:
        """Return all bytes of one rank."""
        states = self.states.weights + self.states.gradients + self.states.optimizer
        return states + self.activations + self.backward_bytes


@dataclass(frozen=True)
class Plan:
    """Memory plan, parameter count and FLOPs of a run: the result of a dry run."""

    config: RunConfig
    gpu: Gpu
    host_gib: float
    """Host memory of this machine, for runs on its CPU."""
    stages: tuple[StageMemory, ...]
    parameters: ParameterCount
    flops_per_token: FlopCount
    """Training, MTP included."""

    @property
    def largest(self) -> StageMemory:
        """Return the stage whose ranks need the most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        """Return whether the largest rank fits the GPU's memory."""
        return self.largest.total <= self.gpu.usable_gib * GIB

    @property
    def ranks_per_stage(self) -> int:
        """Return the number of ranks of each pipeline stage."""
        return self.config.world_size // len(self.stages)

    @property
    def all_ranks_bytes(self) -> float:
        """Return the sum over all ranks of the run."""
        return self.ranks_per_stage * sum(stage.total for stage in self.stages)

    @property
    def fits_host(self) -> bool:
        """Return whether all ranks together fit this machine's memory."""
        return self.all_ranks_bytes <= self.host_gib * GIB

    @property
    def tokens_total(self) -> int:
        """Return the tokens of the whole run."""
        return self.config.tokens_per_step * self.config.training.steps


def plan(config: RunConfig, gpu: Gpu = H100) -> Plan:
    """Return the memory plan of a validated run, without building anything."""
    ranks = config.parallel.pipeline_model_parallel_size
    segments = pipeline_segments(config.model, config.parallel.num_stages)
    return Plan(
        config=config,
        gpu=gpu,
        host_gib=psutil.virtual_memory().total / GIB,
        stages=tuple(_stage(config, rank, segments[rank::ranks]) for rank in range(ranks)),
        parameters=parameters(config.model),
        flops_per_token=flops_per_token(config.model, config.training.sequence_length),
    )


def _stage(config: RunConfig, rank: int, segments: list[str]) -> StageMemory:
    ranks = config.parallel.pipeline_model_parallel_size
    first, last = rank == 0, rank == ranks - 1
    local = local_parameters(config, segments, first=first, last=last)
    microbatches = in_flight(rank, ranks, len(segments), config.num_microbatches)
    chunks = [segment_memory(config, segment) for segment in segments]
    end = last_stage_memory(config) if last else ActivationMemory(0.0, 0.0)
    activations = sum(count * chunk.saved_bytes for count, chunk in zip(microbatches, chunks))
    return StageMemory(
        rank=rank,
        segments=tuple(segments),
        in_flight=tuple(microbatches),
        parameters=local,
        states=state_bytes(config, local),
        activations=activations + microbatches[-1] * end.saved_bytes,
        backward_bytes=max(chunk.backward_bytes for chunk in [*chunks, end]),
    )
