"""What the numbers of a shared table are called: the names of metrics/names.py, for the model and for each layer.

Layers count from 0 as the paper does: a mixer and its experts are one layer.
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
    yield from _sinks(tally.means("first_token_share"))
    yield from _activations(tally)
    yield from _norms(tally)
    yield from _gradients(tally, num_layers)
    entropies = tally.means("entropy")
    if entropies:
        yield "router/entropy", statistics.fmean(entropies.values())
        yield "router/entropy_min", min(entropies.values())
        yield from _by_layer("router/entropy", entropies)
    yield from _delta(tally)


def load_readings(loads: Loads) -> Named:
    """Name each MoE layer's imbalance over the whole global batch: "layer 3" -> experts/max_over_mean_layer_3."""
    for name, load in loads.items():
        place = name.replace(" ", "_")
        yield f"experts/max_over_mean_{place}", max(load) * len(load)
        yield f"experts/dead_{place}", sum(share == 0 for share in load)


def _sinks(shares: Mapping[int, float]) -> Named:
    if shares:
        yield "sinks/first_token", statistics.fmean(shares.values())
        yield "sinks/first_token_max", max(shares.values())
        yield from _by_layer("sinks/first_token", shares)


def _activations(tally: Tally) -> Named:
    largest = dict(enumerate(tally.maxima["activation"].tolist()))
    medians = tally.means("median")
    over = {layer: _ratio(largest[layer], median) for layer, median in medians.items()}
    roots = {layer: math.sqrt(square) for layer, square in tally.means("square").items()}
    yield "activations/max", max(largest.values())
    yield "activations/max_over_median", max(over.values())
    yield from _by_layer("activations/max", largest)
    yield from _by_layer("activations/max_over_median", over)
    yield from _by_layer("activations/rms", roots)


def _norms(tally: Tally) -> Named:
    kinds = dict(zip(NORM_KINDS, tally.maxima["norm_kind"].tolist()))
    yield "norms/max", max(kinds.values())
    yield from ((f"norms/max_{kind}", scale) for kind, scale in kinds.items() if scale)
    yield from _by_layer("norms/max", dict(enumerate(tally.maxima["norm"].tolist())))


def _gradients(tally: Tally, num_layers: int) -> Named:
    norms = tally.sums["gradient"].sqrt().tolist()
    yield from _by_layer("gradients/norm", dict(enumerate(norms[:num_layers])))
    named = zip(OTHER_PLACES, norms[num_layers:])
    yield from ((f"gradients/norm_{place}", norm) for place, norm in named if norm)


def _delta(tally: Tally) -> Named:
    """Half-lives in tokens: of a layer the median over heads, of the model the shortest and longest head too."""
    lives = {
        layer: [_ratio(math.log(2), rate) for rate in rates]
        for layer, rates in tally.means("decay").items()
    }
    if not lives:
        return
    heads = [life for layer in lives.values() for life in layer]
    yield "delta/half_life", statistics.median(heads)
    yield "delta/half_life_min", min(heads)
    yield "delta/half_life_max", max(heads)
    middles = {layer: statistics.median(heads) for layer, heads in lives.items()}
    yield from _by_layer("delta/half_life", middles)
    norms = tally.means("state")
    yield "delta/state_norm", statistics.fmean(norms.values())
    yield from _by_layer("delta/state_norm", norms)


def _by_layer(name: str, values: Mapping[int, float]) -> Named:
    return ((f"{name}_layer_{layer}", value) for layer, value in values.items())


def _ratio(number: float, divisor: float) -> float:
    return number / divisor if divisor else math.inf
