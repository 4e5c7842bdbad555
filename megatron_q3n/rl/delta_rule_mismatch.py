"""Mismatch of the chunked delta rule (training) from the recurrent one (decoding), measured inside the trainer's pass.

Both compute the same sum in another order and differ by rounding; a wrong kernel differs by far more. Each probe
compares the chunked output of one layer with the reference recurrence (kernels/gated_delta/delta_rule.py), on the
first tokens of the first packed row.

Shapes: B = 1 row, T tokens, h heads of this rank, V value head dim, L layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_q3n.kernels.gated_delta.delta_rule import recurrent_gated_delta_rule
from megatron_q3n.model.gated_delta_net import GatedDeltaNet
from megatron_q3n.packing import Packing

# tokens compared in each layer; the recurrence is sequential
MAX_TOKENS = 128


class DeltaRuleProbe:
    """Probe of a GatedDeltaNet that compares its first delta rule. `squares` [2]: Σ difference², Σ recurrent²."""

    def __init__(self) -> None:
        self.squares: Tensor | None = None

    def wrap(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Return the rule with a comparison on its first call."""

        def run(*inputs: Tensor, **options: Any) -> Any:
            result = rule(*inputs, **options)
            if self.squares is None:
                self.squares = squared_differences(inputs, result[0], options.get("packing"))
            return result

        return run


@torch.no_grad()
def squared_differences(inputs: tuple[Tensor, ...], output_BThV: Tensor, packing: Packing | None) -> Tensor:
    """Return Σ (chunked - recurrent)² and Σ recurrent² over the first MAX_TOKENS tokens of one packed row. fp64 [2]."""
    spans = ((0, output_BThV.shape[1]),) if packing is None else packing.spans
    squares = torch.zeros(2, dtype=torch.float64, device=output_BThV.device)
    for begin, end in spans:
        end = min(end, MAX_TOKENS)
        if begin >= end:
            break
        recurrent, _ = recurrent_gated_delta_rule(*(x[:, begin:end] for x in inputs))
        difference = output_BThV[:, begin:end].double() - recurrent.double()
        squares += torch.stack([difference.square().sum(), recurrent.double().square().sum()])
    return squares


@contextmanager
def attach_delta_rule_probes(models: list[Any]) -> Iterator[dict[int, DeltaRuleProbe]]:
    """Attach a probe to every Gated DeltaNet of the main model, by layer, and detach them afterwards."""
    mixers: dict[int, GatedDeltaNet] = {
        (sublayer.layer_number - 1) // 2: module
        for model in models
        for sublayer in model.decoder.layers
        for module in sublayer.modules()
        if isinstance(module, GatedDeltaNet)
    }
    probes = {layer: DeltaRuleProbe() for layer in mixers}
    with models[0].config.pass_state.probing({mixer: probes[layer] for layer, mixer in mixers.items()}):
        yield probes


def max_relative_error(probes: dict[int, DeltaRuleProbe], num_layers: int, world_size: int) -> float:
    """Return √(Σ difference² / Σ recurrent²) of the layer where it is largest. A collective call."""
    squares_L2 = torch.zeros(num_layers, 2, dtype=torch.float64, device=torch.cuda.current_device())
    for layer, probe in probes.items():
        if probe.squares is not None:
            squares_L2[layer] += probe.squares
    if world_size > 1:
        torch.distributed.all_reduce(squares_L2)
    shares_L = squares_L2[:, 0] / squares_L2[:, 1].clamp(min=torch.finfo(torch.float64).tiny)
    return float(shares_L.max().sqrt())
