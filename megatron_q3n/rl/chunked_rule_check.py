"""How far training's delta rule, which walks over chunks, is from the recurrence that generates.

The two are the same sum in another order, so they differ by rounding; a wrong kernel differs by far more. Checked on
what the trainer itself reads, on the first tokens of a pass, against the rule token by token as it is defined
(kernels/gated_delta/delta_rule.py).

Shapes: B = 1 row, T tokens, h heads of this rank, K/V head dims.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_q3n.kernels.gated_delta.delta_rule import recurrent_gated_delta_rule
from megatron_q3n.model.gated_delta_net import GatedDeltaNet

TOKENS = 128  # of each layer, which the recurrence takes one after the other


class ChunkCheck:
    """A GatedDeltaNet's tape: compares its first rule. `squares` [2]: Σ difference², Σ recurrent²."""

    def __init__(self) -> None:
        self.squares: Tensor | None = None

    def heard(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Return the rule, compared when it first runs."""

        def run(*inputs: Tensor, **options: Any) -> Any:
            result = rule(*inputs, **options)
            if self.squares is None:
                self.squares = compared(inputs, result[0], options.get("cu_seqlens"))
            return result

        return run


@torch.no_grad()
def compared(inputs: tuple[Tensor, ...], output_BThV: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return Σ (chunked - recurrent)² and Σ recurrent² over the first TOKENS tokens of one packed row."""
    bounds = [0, output_BThV.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    squares = torch.zeros(2, dtype=torch.float64, device=output_BThV.device)
    for begin, end in itertools.pairwise(bounds):
        end = min(end, TOKENS)
        if begin >= end:
            break
        recurrent, _ = recurrent_gated_delta_rule(*(x[:, begin:end] for x in inputs))
        difference = output_BThV[:, begin:end].double() - recurrent.double()
        squares += torch.stack([difference.square().sum(), recurrent.double().square().sum()])
    return squares


@contextmanager
def checking(models: list[Any]) -> Iterator[dict[int, ChunkCheck]]:
    """Put a check on every Gated DeltaNet of the trunk, by layer, and take it off afterwards."""
    mixers: dict[int, GatedDeltaNet] = {
        (sublayer.layer_number - 1) // 2: module
        for model in models
        for sublayer in model.decoder.layers
        for module in sublayer.modules()
        if isinstance(module, GatedDeltaNet)
    }
    checks = {layer: ChunkCheck() for layer in mixers}
    for layer, mixer in mixers.items():
        mixer.tape = checks[layer]
    try:
        yield checks
    finally:
        for mixer in mixers.values():
            mixer.tape = None


def worst(checks: dict[int, ChunkCheck], num_layers: int, world_size: int) -> float:
    """Return the root of Σ difference² / Σ recurrent² of the layer where it is largest. A collective call."""
    table_L2 = torch.zeros(num_layers, 2, dtype=torch.float64, device=torch.cuda.current_device())
    for layer, check in checks.items():
        if check.squares is not None:
            table_L2[layer] += check.squares
    if world_size > 1:
        torch.distributed.all_reduce(table_L2)
    shares_L = table_L2[:, 0] / table_L2[:, 1].clamp(min=torch.finfo(torch.float64).tiny)
    return float(shares_L.max().sqrt())
