"""Process groups of a run, created once and passed on as a ProcessGroupCollection; and the seeds of every rank.

The only file that uses `megatron.core.parallel_state`. It must be initialized although the groups are passed on,
because HybridModel's MTP placement and several utilities of megatron-core read it.
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
class Rendezvous:
    """Rendezvous of processes without a launcher: a store that they share (e.g. a FileStore), rank and world size."""

    store: torch.distributed.Store
    rank: int
    world_size: int


@dataclass(frozen=True)
class Parallel:
    """Rank, world size and process groups of this process."""

    rank: int
    world_size: int
    groups: ProcessGroupCollection

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, the only process that prints and writes shared files."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Index of the slice of the global batch that this process reads (context-parallel ranks read the same one)."""
        return self.groups.dp.rank()

    @property
    def data_size(self) -> int:
        """Number of slices of the global batch."""
        return self.groups.dp.size()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank is in the last pipeline stage, where the loss is computed."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    def barrier(self) -> None:
        """Wait until every process has called this."""
        torch.distributed.barrier()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any process; the same on every process. A collective call."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([float(flag)], device=torch.cuda.current_device())
        torch.distributed.all_reduce(flags)
        return flags.item() > 0

    def from_leader(self, value: str | None) -> str:
        """Return the leader's string on every process; the others' `value` is ignored. A collective call."""
        holder = [value]
        torch.distributed.broadcast_object_list(holder, src=0)
        assert holder[0] is not None
        return holder[0]


def initialize(config: RunConfig, device: Device, rendezvous: Rendezvous | None = None) -> Parallel:
    """Join the other processes (the launcher's, or those of a rendezvous) unless that is done, build the process groups
    of config.parallel, and seed this rank."""
    rank, world_size = _join(device, rendezvous)
    layout = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        # the distributed optimizer gathers its state over them
        create_gloo_process_groups=True,
    )
    seed(config.training.seed)
    return Parallel(rank, world_size, ProcessGroupCollection.use_mpu_process_groups())


def seed(number: int) -> None:
    """Seed the generators of Python, numpy and torch, and megatron-core's model-parallel generators of this rank."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
    model_parallel_cuda_manual_seed(number)


def shutdown() -> None:
    """Destroy the process groups; safe to call twice."""
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def leave_groups() -> None:
    """Destroy the process groups but not the connection of the processes, so that other groups can be built."""
    parallel_state.destroy_model_parallel()


def _join(device: Device, rendezvous: Rendezvous | None) -> tuple[int, int]:
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if rendezvous is None and not launch.has_rendezvous():
        # one process without a launcher: no TCP port, so no collision with another run
        rendezvous = Rendezvous(torch.distributed.HashStore(), rank=0, world_size=1)
    rank = rendezvous.rank if rendezvous else launch.rank()
    world_size = rendezvous.world_size if rendezvous else launch.world_size()
    torch.distributed.init_process_group(
        device.communication,
        store=rendezvous.store if rendezvous else None,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=30),
    )
    return rank, world_size
