"""What lies where: each piece is one rule of Hugging Face's table and its boxes in a checkpoint.

A checkpoint knows whole (global) tensors under layout-free keys, stored in any number of boxes. Its
keys differ from parameter names in one way: the DeltaNet's fused projections are kept section by
section, so that tensor parallelism can cut each (`model/gated_delta_net.py`). Experts are cut out
of their stacks one by one, gate and up apart, so that a stack is never in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_q3n.config import ModelConfig
from megatron_q3n.hf import Family, Rule, rules
from megatron_q3n.hf.rule import Shape

# kept in fp32 in every checkpoint, whatever the compute format (`model/gated_delta_net.py`)
FLOAT32 = (".A_log", ".dt_bias", ".out_norm.weight")


@dataclass(frozen=True)
class Box:
    """A rectangular part of a checkpoint's tensor."""

    key: str
    whole: Shape
    offset: Shape
    shape: Shape


@dataclass(frozen=True)
class Piece:
    """A rule, and the boxes that hold its megatron-core tensor, row after row."""

    rule: Rule
    boxes: tuple[Box, ...]

    @property
    def is_float32(self) -> bool:
        """Whether checkpoints keep this tensor in fp32 always."""
        return self.rule.megatron.endswith(FLOAT32)

    @property
    def num_elements(self) -> int:
        """Number of weights in it."""
        return sum(torch.Size(box.shape).numel() for box in self.boxes)

    def cut(self, tensor: Tensor) -> Iterator[tuple[Box, Tensor]]:
        """Cut the rule's tensor into the boxes."""
        rows = [torch.Size(box.shape).numel() // tensor[0].numel() for box in self.boxes]
        for box, part in zip(self.boxes, tensor.split(rows), strict=True):
            yield box, part.reshape(box.shape)

    def join(self, boxes: list[Tensor]) -> Tensor:
        """Undo `cut`."""
        return torch.cat([box.reshape(-1, *self.rule.shape[1:]) for box in boxes])


def pieces(config: ModelConfig, family: Family) -> Iterator[Piece]:
    """Yield the whole model, in the order of the layers."""
    for rule in rules(config, family):
        if rule.stacked is not None:
            yield from _experts(rule, config.num_moe_experts)
        elif sections := _sections(rule.megatron, config):
            boxes = []
            for name, rows in sections.items():
                shape = (rows, *rule.shape[1:])
                boxes.append(Box(f"{rule.megatron}.{name}", shape, (0,) * len(shape), shape))
            yield Piece(rule, tuple(boxes))
        else:
            origin = (0,) * len(rule.shape)
            yield Piece(rule, (Box(rule.megatron, rule.shape, origin, rule.shape),))


def fresh_state(config: ModelConfig, family: Family) -> Iterator[tuple[Box, Tensor]]:
    """Yield what a checkpoint holds beside weights, as it is before the first step: each router's
    share of tokens per expert, which starts even (`model/moe/router.py`)."""
    shape = (config.num_moe_experts,)
    for rule in rules(config, family):
        if rule.megatron.endswith(".mlp.router.weight"):
            key = rule.megatron.removesuffix("weight") + "expert_load"
            yield Box(key, shape, (0,), shape), torch.full(shape, 1 / shape[0])


def _experts(rule: Rule, num: int) -> Iterator[Piece]:
    names, parts = list(rule.hf), len(rule.hf) // num
    rows = rule.shape[1] // parts
    for expert in range(num):
        own = names[expert * parts : (expert + 1) * parts]
        one = replace(
            rule,
            shape=rule.shape[1:],
            hf={name: rule.hf[name] for name in own},
            join=torch.cat,
            split=lambda tensor: list(tensor.chunk(parts)),
            stacked=None,
        )
        shape = (1, rows, rule.shape[2])
        yield Piece(
            one, tuple(Box(rule.megatron, rule.shape, (expert, part * rows, 0), shape) for part in range(parts))
        )


def _sections(name: str, config: ModelConfig) -> dict[str, int]:
    """Return the sections of a DeltaNet projection and their rows; of other tensors, none."""
    keys, values, heads = config.key_dim, config.value_dim, config.linear_num_value_heads
    if name.endswith(".in_proj.weight"):
        return {"query": keys, "key": keys, "value": values, "z": values}
    if name.endswith(".conv1d.weight"):
        return {"query": keys, "key": keys, "value": values}
    return {"beta": heads, "alpha": heads} if name.endswith(".beta_alpha_proj.weight") else {}
