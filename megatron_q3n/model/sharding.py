"""Sharded state dicts of this package's modules for dist_checkpointing, with keys independent of the layout.

TransformerEngine adds `_extra_state` entries to its modules. The FP8 recipes used here have no state between steps, and
a checkpoint must load on either backend, so `drop_extra_state` removes those entries.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import nn
from torch.distributed import ProcessGroup


def sharded_parameters(
    module: nn.Module,
    prefix: str,
    sharded_offsets: tuple,
    metadata: dict | None,
    tp_group: ProcessGroup,
    tensor_parallel_axes: dict[str, int],
) -> dict[str, Any]:
    """Shard a module's own vectors over tensor-parallel ranks by these axes, and its children by their own rules."""
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    vectors = {
        name: tensor
        for name, tensor in module.state_dict(prefix="", keep_vars=True).items()
        if name in tensor_parallel_axes
    }
    sharded = make_sharded_tensors_for_checkpoint(
        vectors, prefix, tensor_parallel_axes, sharded_offsets, tp_group=tp_group, dp_cp_group=metadata["dp_cp_group"]
    )
    for name, child in module.named_children():
        if not any(key.startswith(f"{name}.") for key in vectors):
            sharded.update(
                sharded_state_dict_default(child, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=tp_group)
            )
    return sharded


def shard_by_section(sharded: dict[str, Any], key: str, sections: Sequence[int], names: Sequence[str]) -> None:
    """Replace one row-sharded tensor by its named sections, each sharded over tensor-parallel ranks separately."""
    sharded[key] = _split_tensor_factory(sharded[key], list(sections), list(names), 0)


def stacked_experts(
    key: str, weight: nn.Parameter, ep_group: ProcessGroup, etp_group: ProcessGroup, edp_rank: int, *, cut: str
) -> ShardedTensor | ShardedTensorFactory:
    """Describe [local experts, out, in] as a slice of the global [experts, out, in].

    `cut` selects how expert tensor parallelism slices it: "inputs" (columns), or "gated_outputs", where the rows are a
    gate half and an up half, each sliced separately.
    """
    experts = (0, ep_group.rank(), ep_group.size())
    rank, size = etp_group.rank(), etp_group.size()
    replica = (0, 0, edp_rank)
    if cut == "inputs":
        return ShardedTensor.from_rank_offsets(key, weight, experts, (2, rank, size), replica_id=replica)
    assert cut == "gated_outputs"

    def build(name: str, data: torch.Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
        assert flattened_range is None
        return [
            ShardedTensor.from_rank_offsets(
                name, half.contiguous(), experts, (1, offset + rank, 2 * size), replica_id=replica_id
            )
            for half, offset in zip(data.chunk(2, dim=1), (0, size))
        ]

    def merge(halves: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(halves, dim=1)

    return ShardedTensorFactory(key, weight, build, merge, replica)


def drop_extra_state(sharded: dict[str, Any]) -> dict[str, Any]:
    """Return the description without TransformerEngine's `_extra_state` entries."""
    return {key: value for key, value in sharded.items() if not key.endswith("_extra_state")}
