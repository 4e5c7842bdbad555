"""The process groups of a run, made once and handed on as a ProcessGroupCollection; and the seeds of every rank.

The only file that touches `megatron.core.parallel_state`, which must be initialised even though the
groups are handed on: HybridModel's MTP placement and several utilities still ask it.
"""

import datetime
import random
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_q3n.config import RunConfig, launch
from megatron_q3n.device import Device


@dataclass(frozen=True)
class Meeting:
    """Where processes without a launcher meet: a store they share (a FileStore, say), and who this one is."""

    store: torch.distributed.Store
    rank: int
    world_size: int


@dataclass(frozen=True)
class Parallel:
    """This process's place in the run."""

    rank: int
    world_size: int
    groups: ProcessGroupCollection

    @property
    def is_leader(self) -> bool:
        """The one process that prints and writes shared files."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which slice of the global batch this process reads (context-parallel ranks share one)."""
        return self.groups.dp.rank()

    @property
    def data_size(self) -> int:
        """Slices of the global batch."""
        return self.groups.dp.size()

    @property
    def is_last_stage(self) -> bool:
        """Whether the loss is computed here."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    def barrier(self) -> None:
        """Wait for every process."""
        torch.distributed.barrier()

    def any(self, flag: bool) -> bool:
        """Say whether any process raised the flag; every process gets the same answer."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor([float(flag)], device=torch.cuda.current_device())
        torch.distributed.all_reduce(votes)
        return votes.item() > 0

    def from_leader(self, value: str | None) -> str:
        """Return the leader's string on every process."""
        holder = [value]
        torch.distributed.broadcast_object_list(holder, src=0)
        assert holder[0] is not None
        return holder[0]


def initialize(config: RunConfig, device: Device, meeting: Meeting | None = None) -> Parallel:
    """Join the other processes (the launcher's, or those of a meeting), build the groups of
    config.parallel, and seed this rank."""
    rank, world_size = _join(device, meeting)
    layout = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        create_gloo_process_groups=True,  # the distributed optimizer gathers its state over them
    )
    seed(config.training.seed)
    return Parallel(rank, world_size, ProcessGroupCollection.use_mpu_process_groups())


def seed(number: int) -> None:
    """Seed every generator: Python, numpy, torch, and megatron-core's per-rank model-parallel states."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
    model_parallel_cuda_manual_seed(number)


def shutdown() -> None:
    """Leave the process groups; safe to call twice."""
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _join(device: Device, meeting: Meeting | None) -> tuple[int, int]:
    if meeting is None and not launch.has_neighbours():
        # alone: no port to collide with a neighbour's
        meeting = Meeting(torch.distributed.HashStore(), rank=0, world_size=1)
    rank = meeting.rank if meeting else launch.rank()
    world_size = meeting.world_size if meeting else launch.world_size()
    torch.distributed.init_process_group(
        device.communication,
        store=meeting.store if meeting else None,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=30),
    )
    return rank, world_size
