"""The memory of every pipeline rank of a run, and whether the fullest one fits a card.

Ranks of one pipeline stage are alike (the imbalance margin on experts stands for the fullest of them), so a plan has
one row per stage. The arithmetic covers tensors; CUDA context, NCCL buffers, workspaces and fragmentation are a
card's `reserve_gib`.
"""

from dataclasses import dataclass

import psutil

from megatron_q3n.config import RunConfig
from megatron_q3n.config.sizes import FlopCount, ParameterCount, flops_per_token, parameters, pipeline_segments
from megatron_q3n.planner.recompute import Need, end_need, segment_need
from megatron_q3n.planner.schedule import in_flight
from megatron_q3n.planner.states import Held, StateBytes, held_parameters, state_bytes

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU's memory, and what of it tensors cannot have."""

    name: str
    memory_gib: float
    reserve_gib: float = 4.0

    @property
    def usable_gib(self) -> float:
        """Return the memory left for tensors."""
        return self.memory_gib - self.reserve_gib


H100 = Card("H100 80 GB", 80e9 / GIB)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of one pipeline stage."""

    rank: int
    segments: tuple[str, ...]
    """Sublayers of each model chunk, as megatron-core's symbols."""
    in_flight: tuple[int, ...]
    """Micro-batches held at the fullest moment, per model chunk."""
    held: Held
    states: StateBytes
    activations: float
    working: float
    """Of the one sublayer running backward: transient and rebuilt tensors."""

    @property
    def num_sublayers(self) -> int:
        """Return the stage's megatron-core layers, MTP excepted."""
        return sum(len(segment) for segment in self.segments)

    @property
    def total(self) -> float:
        """Return all bytes of one rank."""
        states = self.states.weights + self.states.gradients + self.states.optimizer
        return states + self.activations + self.working


@dataclass(frozen=True)
class Plan:
    """What a dry run tells."""

    config: RunConfig
    card: Card
    host_gib: float
    """Memory of this machine, for runs on its CPU."""
    stages: tuple[StageMemory, ...]
    parameters: ParameterCount
    flops_per_token: FlopCount
    """Training, MTP included."""

    @property
    def largest(self) -> StageMemory:
        """Return the stage whose ranks need most."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        """Say whether the largest rank fits the card."""
        return self.largest.total <= self.card.usable_gib * GIB

    @property
    def ranks_per_stage(self) -> int:
        """Return how many ranks each row of the plan stands for."""
        return self.config.world_size // len(self.stages)

    @property
    def all_ranks_bytes(self) -> float:
        """Return the sum over the whole world."""
        return self.ranks_per_stage * sum(stage.total for stage in self.stages)

    @property
    def fits_host(self) -> bool:
        """Say whether all ranks together fit this machine's memory."""
        return self.all_ranks_bytes <= self.host_gib * GIB

    @property
    def tokens_total(self) -> int:
        """Return the tokens of the whole run."""
        return self.config.tokens_per_step * self.config.training.steps


def plan(config: RunConfig, card: Card = H100) -> Plan:
    """Work out the memory of a validated run on every pipeline rank, without building anything."""
    ranks = config.parallel.pipeline_model_parallel_size
    segments = pipeline_segments(config.model, config.parallel.num_stages)
    return Plan(
        config=config,
        card=card,
        host_gib=psutil.virtual_memory().total / GIB,
        stages=tuple(_stage(config, rank, segments[rank::ranks]) for rank in range(ranks)),
        parameters=parameters(config.model),
        flops_per_token=flops_per_token(config.model, config.training.sequence_length),
    )


def _stage(config: RunConfig, rank: int, segments: list[str]) -> StageMemory:
    ranks = config.parallel.pipeline_model_parallel_size
    first, last = rank == 0, rank == ranks - 1
    held = held_parameters(config, segments, first=first, last=last)
    microbatches = in_flight(rank, ranks, len(segments), config.num_microbatches)
    needs = [segment_need(config, segment) for segment in segments]
    end = end_need(config) if last else Need(0.0, 0.0)
    activations = sum(count * need.kept for count, need in zip(microbatches, needs))
    return StageMemory(
        rank=rank,
        segments=tuple(segments),
        in_flight=tuple(microbatches),
        held=held,
        states=state_bytes(config, held),
        activations=activations + microbatches[-1] * end.kept,
        working=max(need.working for need in [*needs, end]),
    )
