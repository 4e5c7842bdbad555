"""What the numbers of a shared table are called: the names of metrics/names.py, for the model and for each layer.

Layers count from 0 as the paper does: a mixer and its experts are one layer. MTP's layer has a number of its own and is
in no mean, largest or smallest of the model's, so that these compare with a model that has none.
"""

import math
import statistics
from collections.abc import Iterator, Mapping

from megatron_q3n.instruments.tally import Tally
from megatron_q3n.instruments.weights import NORM_KINDS, OTHER_PLACES

Loads = dict[str, list[float]]
Named = Iterator[tuple[str, float]]


def readings(tally: Tally, num_layers: int) -> Named:
    """Name what a shared table holds. Layers without a number (no attention, no Gated DeltaNet) are left out."""
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
    """Name each MoE layer's imbalance over the whole global batch: "layer 3" -> experts/max_over_mean_layer_3."""
    for name, load in loads.items():
        place = name.replace(" ", "_")
        yield f"experts/max_over_mean_{place}", max(load) * len(load)
        yield f"experts/dead_{place}", sum(share == 0 for share in load)


def _sinks(shares: Mapping[int, float], num_layers: int) -> Named:
    trunk = _trunk(shares, num_layers)
    if trunk:
        yield "sinks/first_token", statistics.fmean(trunk)
        yield "sinks/first_token_max", max(trunk)
    yield from _by_layer("sinks/first_token", shares, num_layers)


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
    yield "norms/max", max(kinds.values())
    yield from ((f"norms/max_{kind}", scale) for kind, scale in kinds.items() if scale)
    scales = dict(enumerate(tally.maxima["norm"].tolist()))
    yield from _by_layer("norms/max", scales, len(scales))


def _gradients(tally: Tally, num_layers: int) -> Named:
    norms = tally.sums["gradient"].sqrt().tolist()
    yield from _by_layer("gradients/norm", dict(enumerate(norms[:num_layers])), num_layers)
    named = zip(OTHER_PLACES, norms[num_layers:])
    yield from ((f"gradients/norm_{place}", norm) for place, norm in named if norm)


def _delta(tally: Tally, num_layers: int) -> Named:
    """Half-lives in tokens: of a layer the median over heads, of the model the shortest and longest head too."""
    lives = {layer: [_ratio(math.log(2), rate) for rate in rates] for layer, rates in tally.means("decay").items()}
    if not lives:
        return
    heads = [life for layer in lives.values() for life in layer]
    yield "delta/half_life", statistics.median(heads)
    yield "delta/half_life_min", min(heads)
    yield "delta/half_life_max", max(heads)
    middles = {layer: statistics.median(heads) for layer, heads in lives.items()}
    yield from _by_layer("delta/half_life", middles, num_layers)
    norms = tally.means("state")
    yield "delta/state_norm", statistics.fmean(norms.values())
    yield from _by_layer("delta/state_norm", norms, num_layers)


def _trunk(values: Mapping[int, float], num_layers: int) -> list[float]:
    return [value for row, value in values.items() if row < num_layers]


def _by_layer(name: str, values: Mapping[int, float], num_layers: int) -> Named:
    for row, value in values.items():
        yield f"{name}_layer_{row}" if row < num_layers else f"{name}_mtp", value


def _ratio(number: float, divisor: float) -> float:
    return number / divisor if divisor else math.inf
