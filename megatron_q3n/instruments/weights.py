"""Measurements of parameters: the largest scale of every norm, and the gradient norm by layer.

**Norm scales.** A zero-centered norm multiplies by 1 + weight; measured is the largest |1 + weight| (|weight| of a norm
that is not zero-centered). Qwen3-Next's description gives growth of these weights as the reason for decaying them.

**Gradient norms.** Measured where the optimizer computes the norm of the whole gradient: reduced over micro-batches and
ranks, of the loss per token, before clipping. With the distributed optimizer every rank has its own shard of each
parameter there, so squares are summed over all ranks. Parameters that are replicated over tensor-parallel ranks, and
MTP's copy of the embedding, count once, as in the whole norm.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from megatron_q3n.config import RunConfig
from megatron_q3n.instruments.tally import Shapes, Tally

OTHER_PARTS = ("embedding", "head", "mtp")
"""Parts of the model other than the trunk's layers; the final norm belongs to the head."""

# kind of norm in the metric's name -> endings of its weights' names
NORM_KINDS = {
    "mixer": ("input_layernorm.weight",),
    "moe": ("pre_mlp_layernorm.weight",),
    "query": ("q_layernorm.weight",),
    "key": ("k_layernorm.weight",),
    "delta_output": ("out_norm.weight",),
    "final": ("final_norm.weight",),
    "mtp": ("enorm.weight", "hnorm.weight", "final_layernorm.weight"),
}


def tables(config: RunConfig) -> tuple[Shapes, Shapes]:
    """Return the shapes of the sums and maxima that this module fills."""
    layers = config.model.num_layers
    return {"gradient": (layers + len(OTHER_PARTS),)}, {"norm": (layers,), "norm_kind": (len(NORM_KINDS),)}


def row_of(name: str, model: Any, num_layers: int) -> int:
    """Return the row of a parameter: its layer, or after the layers one of OTHER_PARTS."""
    if name.startswith("decoder.layers."):
        return (model.decoder.layers[int(name.split(".")[2])].layer_number - 1) // 2
    other = "mtp" if name.startswith("mtp.") else "head"
    if name.startswith("embedding."):
        other = "embedding"
    return num_layers + OTHER_PARTS.index(other)


def kind_of(name: str) -> int | None:
    """Return the index in NORM_KINDS of a norm's weight; None for other parameters."""
    matches = [name.endswith(endings) for endings in NORM_KINDS.values()]
    if True not in matches:
        return None
    return list(NORM_KINDS).index("mtp") if name.startswith("mtp.") else matches.index(True)


@torch.no_grad()
def measure_norm_scales(models: list[nn.Module], num_layers: int, tally: Tally) -> None:
    """Measure the largest scale of every norm."""
    for model in models:
        center = 1.0 if model.config.layernorm_zero_centered_gamma else 0.0  # type: ignore[union-attr]
        for name, weight in model.named_parameters():
            kind = kind_of(name)
            if kind is None:
                continue
            scale = (weight.float() + center).abs().amax()
            tally.update_max("norm_kind", kind, scale)
            row = row_of(name, model, num_layers)
            if row < num_layers:
                tally.update_max("norm", row, scale)


class GradientReader:
    """Gradient norms by layer, read from the optimizer in steps for which they are requested."""

    def __init__(self, models: list[nn.Module], optimizer: Any, num_layers: int, tally: Tally) -> None:
        """Wrap the optimizer's `get_grad_norm`, which it calls once per step."""
        self._row_of = {
            id(weight): row_of(name, model, num_layers) for model in models for name, weight in model.named_parameters()
        }
        self._parts = getattr(optimizer, "chained_optimizers", [optimizer])
        self._tally, self._is_requested = tally, False
        self._norm = optimizer.get_grad_norm
        optimizer.get_grad_norm = self._read_then_norm

    def request(self, is_requested: bool) -> None:
        """Set whether the next step's gradient is read."""
        self._is_requested = is_requested

    def _read_then_norm(self) -> Any:
        if self._is_requested:
            self._is_requested = False
            self._read()
        return self._norm()

    @torch.no_grad()
    def _read(self) -> None:
        rows, gradients = [], []
        for part in self._parts:
            for weight, gradient in _local_gradients(part):
                rows.append(self._row_of[id(weight)])
                gradients.append(gradient)
        if not gradients:
            return
        squares = torch.stack(torch._foreach_norm(gradients)).double().square()
        self._tally.sums["gradient"].index_add_(0, torch.tensor(rows, device=squares.device), squares)


def _local_gradients(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (parameter, this rank's shard of its gradient) of a DistributedOptimizer, without duplicates."""
    if getattr(optimizer, "is_stub_optimizer", False):
        return
    groups = zip(
        chain(optimizer.model_float16_groups, optimizer.model_fp32_groups),
        chain(optimizer.shard_fp32_from_float16_groups, optimizer.shard_fp32_groups),
    )
    for weight, shard in chain.from_iterable(zip(*group) for group in groups):
        counts = param_is_not_shared(shard) and param_is_not_tensor_parallel_duplicate(
            shard,
            tp_group=getattr(optimizer, "tp_group", None),
            expert_tp_group=getattr(optimizer, "expert_tp_group", None),
        )
        if shard.grad is not None and counts:
            yield weight, shard.grad
