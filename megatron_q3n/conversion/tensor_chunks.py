"""Chunks of checkpoint tensors: each `ParamMapping` with the chunks of the checkpoint that hold its tensor.

A checkpoint holds global tensors under layout-independent keys, each stored in any number of chunks. Its keys differ
from parameter names in one way: DeltaNet's fused projections are stored section by section, so that tensor parallelism
can shard each section (`model/gated_delta_net.py`). Experts are mapped one by one, gate and up separately, so that a
stack of experts is never in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_q3n.config import ModelConfig
from megatron_q3n.hf import Family, ParamMapping, param_mappings
from megatron_q3n.hf.param_mapping import Shape

# fp32 in every checkpoint, whatever the compute dtype (`model/gated_delta_net.py`)
FLOAT32 = (".A_log", ".dt_bias", ".out_norm.weight")


@dataclass(frozen=True)
class TensorChunk:
    """A rectangular chunk of a checkpoint's global tensor, as in torch.distributed.checkpoint."""

    key: str
    global_shape: Shape
    offset: Shape
    shape: Shape


@dataclass(frozen=True)
class ChunkedMapping:
    """A mapping, and the chunks that hold its megatron-core tensor, concatenated along the rows."""

    mapping: ParamMapping
    chunks: tuple[TensorChunk, ...]

    @property
    def is_float32(self) -> bool:
        """Whether checkpoints hold this tensor in fp32 always."""
        return self.mapping.megatron.endswith(FLOAT32)

    @property
    def num_elements(self) -> int:
        """Number of elements of the tensor."""
        return sum(torch.Size(chunk.shape).numel() for chunk in self.chunks)

    def cut(self, tensor: Tensor) -> Iterator[tuple[TensorChunk, Tensor]]:
        """Split the mapping's tensor into the chunks."""
        rows = [torch.Size(chunk.shape).numel() // tensor[0].numel() for chunk in self.chunks]
        for chunk, part in zip(self.chunks, tensor.split(rows), strict=True):
            yield chunk, part.reshape(chunk.shape)

    def join(self, chunks: list[Tensor]) -> Tensor:
        """Undo `cut`."""
        return torch.cat([chunk.reshape(-1, *self.mapping.shape[1:]) for chunk in chunks])


def chunked_mappings(config: ModelConfig, family: Family) -> Iterator[ChunkedMapping]:
    """Yield the mappings of all parameters with their chunks, in the order of the layers."""
    for mapping in param_mappings(config, family):
        if mapping.stacked is not None:
            yield from _experts(mapping, config.num_moe_experts)
        elif sections := _sections(mapping.megatron, config):
            chunks = []
            for name, rows in sections.items():
                shape = (rows, *mapping.shape[1:])
                chunks.append(TensorChunk(f"{mapping.megatron}.{name}", shape, (0,) * len(shape), shape))
            yield ChunkedMapping(mapping, tuple(chunks))
        else:
            origin = (0,) * len(mapping.shape)
            yield ChunkedMapping(mapping, (TensorChunk(mapping.megatron, mapping.shape, origin, mapping.shape),))


def initial_router_state(config: ModelConfig, family: Family) -> Iterator[tuple[TensorChunk, Tensor]]:
    """Yield each router's expert load before the first step: an equal share of tokens per expert.

    A checkpoint holds this state besides the weights (`model/moe/router.py`).
    """
    shape = (config.num_moe_experts,)
    for mapping in param_mappings(config, family):
        if mapping.megatron.endswith(".mlp.router.weight"):
            key = mapping.megatron.removesuffix("weight") + "expert_load"
            yield TensorChunk(key, shape, (0,), shape), torch.full(shape, 1 / shape[0])


def _experts(mapping: ParamMapping, num: int) -> Iterator[ChunkedMapping]:
    names, parts = list(mapping.hf), len(mapping.hf) // num
    rows = mapping.shape[1] // parts
    for expert in range(num):
        expert_names = names[expert * parts : (expert + 1) * parts]
        one = replace(
            mapping,
            shape=mapping.shape[1:],
            hf={name: mapping.hf[name] for name in expert_names},
            join=torch.cat,
            split=lambda tensor: list(tensor.chunk(parts)),
            stacked=None,
        )
        shape = (1, rows, mapping.shape[2])
        yield ChunkedMapping(
            one,
            tuple(
                TensorChunk(mapping.megatron, mapping.shape, (expert, part * rows, 0), shape) for part in range(parts)
            ),
        )


def _sections(name: str, config: ModelConfig) -> dict[str, int]:
    """Return the sections of a DeltaNet projection and their numbers of rows; empty for other tensors."""
    keys, values, heads = config.key_dim, config.value_dim, config.linear_num_value_heads
    if name.endswith(".in_proj.weight"):
        return {"query": keys, "key": keys, "value": values, "z": values}
    if name.endswith(".conv1d.weight"):
        return {"query": keys, "key": keys, "value": values}
    return {"beta": heads, "alpha": heads} if name.endswith(".beta_alpha_proj.weight") else {}
