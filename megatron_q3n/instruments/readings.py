"""Metrics of a reduced tally, by the names of metrics/names.py: for the whole model and for each layer.

Layers count from 0; a mixer and the MoE after it are one layer. The MTP layer has metrics of its own and is left out of
the model's means, maxima and minima, so that these are comparable with a model without MTP.
"""

import math
import statistics
from collections.abc import Iterator, Mapping

from megatron_q3n.instruments.tally import Tally
from megatron_q3n.instruments.weights import NORM_KINDS, OTHER_PARTS

Loads = dict[str, list[float]]
Named = Iterator[tuple[str, float]]


def readings(tally: Tally, num_layers: int) -> Named:
    """Yield the metrics of a tally. Layers without a value (no attention, no Gated DeltaNet) are left out."""
    yield from _sinks(tally.means("first_token_share"), num_layers)
    yield from _activations(tally, num_layers)
    yield from _norms(tally)
    yield from _gradients(tally, num_layers)
    entropies = tally.means("entropy")
    trunk = _trunk(entropies, num_layers)
    if trunk:
        yield "router/entropy", statistics.fmean(trunk)
        yield "router/entropy_min", min(trunk)
    yield from _by_layer("router/entropy", entropies, num_layers)
    yield from _delta(tally, num_layers)


def load_readings(loads: Loads) -> Named:
    """Yield each MoE layer's load imbalance over the global batch: "layer 3" -> experts/load_imbalance_layer_3."""
    for name, load in loads.items():
        layer = name.replace(" ", "_")
        yield f"experts/load_imbalance_{layer}", max(load) * len(load)
        yield f"experts/dead_{layer}", sum(share == 0 for share in load)


def _sinks(shares: Mapping[int, float], num_layers: int) -> Named:
    trunk = _trunk(shares, num_layers)
    if trunk:
        yield "attention/first_token_share", statistics.fmean(trunk)
        yield "attention/first_token_share_max", max(trunk)
    yield from _by_layer("attention/first_token_share", shares, num_layers)


def _activations(tally: Tally, num_layers: int) -> Named:
    medians = tally.means("median")
    all_maxima = tally.maxima["activation"].tolist()
    largest = {row: all_maxima[row] for row in medians}
    over = {row: _ratio(largest[row], median) for row, median in medians.items()}
    roots = {row: math.sqrt(square) for row, square in tally.means("square").items()}
    yield "activations/max", max(_trunk(largest, num_layers))
    yield "activations/max_over_median", max(_trunk(over, num_layers))
    yield from _by_layer("activations/max", largest, num_layers)
    yield from _by_layer("activations/max_over_median", over, num_layers)
    yield from _by_layer("activations/rms", roots, num_layers)


def _norms(tally: Tally) -> Named:
    kinds = dict(zip(NORM_KINDS, tally.maxima["norm_kind"].tolist()))
    yield "norm_scale/max", max(kinds.values())
    yield from ((f"norm_scale/max_{kind}", scale) for kind, scale in kinds.items() if scale)
    scales = dict(enumerate(tally.maxima["norm"].tolist()))
    yield from _by_layer("norm_scale/max", scales, len(scales))


def _gradients(tally: Tally, num_layers: int) -> Named:
    norms = tally.sums["gradient"].sqrt().tolist()
    yield from _by_layer("gradients/norm", dict(enumerate(norms[:num_layers])), num_layers)
    named = zip(OTHER_PARTS, norms[num_layers:])
    yield from ((f"gradients/norm_{part}", norm) for part, norm in named if norm)


def _delta(tally: Tally, num_layers: int) -> Named:
    """Yield half-lives in tokens (median over each layer's heads; median, min and max of the model) and state norms."""
    lives = {layer: [_ratio(math.log(2), rate) for rate in rates] for layer, rates in tally.means("decay").items()}
    if not lives:
        return
    heads = [life for layer in lives.values() for life in layer]
    yield "gated_delta/half_life_tokens", statistics.median(heads)
    yield "gated_delta/half_life_tokens_min", min(heads)
    yield "gated_delta/half_life_tokens_max", max(heads)
    middles = {layer: statistics.median(heads) for layer, heads in lives.items()}
    yield from _by_layer("gated_delta/half_life_tokens", middles, num_layers)
    norms = tally.means("state")
    yield "gated_delta/state_norm", statistics.fmean(norms.values())
    yield from _by_layer("gated_delta/state_norm", norms, num_layers)


def _trunk(values: Mapping[int, float], num_layers: int) -> list[float]:
    return [value for row, value in values.items() if row < num_layers]


def _by_layer(name: str, values: Mapping[int, float], num_layers: int) -> Named:
    for row, value in values.items():
        yield f"{name}_layer_{row}" if row < num_layers else f"{name}_mtp", value


def _ratio(number: float, divisor: float) -> float:
    return number / divisor if divisor else math.inf
