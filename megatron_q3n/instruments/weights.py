"""What the parameters tell by themselves: the largest scale of every norm, and the gradient's norm by layer.

**Norm scales.** A zero-centered norm multiplies by 1 + weight; the number is the largest |1 + weight| (|weight| of a
norm that is not zero-centered). Qwen3-Next's description gives growth of these weights as the reason for decaying them.

**Gradient norms.** Read where the optimizer takes the norm of the whole gradient: summed over micro-batches and ranks,
divided by the global batch's tokens, not clipped yet. With the distributed optimizer every rank has its own part of
each parameter there, so squares add up over all ranks; what tensor-parallel ranks hold alike, and MTP's copy of the
embedding, counts once, as it does in the whole norm.
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

OTHER_PLACES = ("embedding", "head", "mtp")
"""Where a parameter can be beside the trunk's layers; the final norm belongs to the head."""

# the kind a norm is reported under -> how the names of its weights end
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
    """Return the shapes of the sums and maxima that are filled here."""
    layers = config.model.num_layers
    return {"gradient": (layers + len(OTHER_PLACES),)}, {"norm": (layers,), "norm_kind": (len(NORM_KINDS),)}


def place_of(name: str, model: Any, num_layers: int) -> int:
    """Return the row of a parameter: its layer, or behind the layers one of OTHER_PLACES."""
    if name.startswith("decoder.layers."):
        return (model.decoder.layers[int(name.split(".")[2])].layer_number - 1) // 2
    other = "mtp" if name.startswith("mtp.") else "head"
    if name.startswith("embedding."):
        other = "embedding"
    return num_layers + OTHER_PLACES.index(other)


def kind_of(name: str) -> int | None:
    """Return the kind of norm that a parameter is the weight of, as an index; None for other parameters."""
    ends = [any(name.endswith(end) for end in ends) for ends in NORM_KINDS.values()]
    if True not in ends:
        return None
    return list(NORM_KINDS).index("mtp") if name.startswith("mtp.") else ends.index(True)


@torch.no_grad()
def gather_norms(models: list[nn.Module], num_layers: int, tally: Tally) -> None:
    """Take every norm's largest scale."""
    for model in models:
        centre = 1.0 if model.config.layernorm_zero_centered_gamma else 0.0  # type: ignore[union-attr]
        for name, weight in model.named_parameters():
            kind = kind_of(name)
            if kind is None:
                continue
            scale = (weight.float() + centre).abs().amax()
            tally.raise_to("norm_kind", kind, scale)
            place = place_of(name, model, num_layers)
            if place < num_layers:
                tally.raise_to("norm", place, scale)


class GradientReader:
    """Reads the optimizer's gradients by layer, once each time it is asked to."""

    def __init__(self, models: list[nn.Module], optimizer: Any, num_layers: int, tally: Tally) -> None:
        """Stand before the optimizer's `get_grad_norm`, which it calls once a step."""
        self._place = {
            id(weight): place_of(name, model, num_layers)
            for model in models
            for name, weight in model.named_parameters()
        }
        self._parts = getattr(optimizer, "chained_optimizers", [optimizer])
        self._tally, self._asked = tally, False
        self._norm = optimizer.get_grad_norm
        optimizer.get_grad_norm = self._read_then_norm

    def ask(self, wanted: bool) -> None:
        """Read the next step's gradient, or do not."""
        self._asked = wanted

    def _read_then_norm(self) -> Any:
        if self._asked:
            self._asked = False
            self._read()
        return self._norm()

    @torch.no_grad()
    def _read(self) -> None:
        places, gradients = [], []
        for part in self._parts:
            for weight, gradient in _own_gradients(part):
                places.append(self._place[id(weight)])
                gradients.append(gradient)
        if not gradients:
            return
        squares = torch.stack(torch._foreach_norm(gradients)).double().square()
        rows = torch.tensor(places, device=squares.device)
        self._tally.sums["gradient"].index_add_(0, rows, squares)


def _own_gradients(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (parameter, this rank's part of its gradient) of a DistributedOptimizer, without copies on other ranks."""
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
