"""Activations of a whole pipeline rank: sublayers × micro-batches in flight, under the recompute settings.

none       every sublayer keeps its footprint
selective  … less what the modules drop; one sublayer's dropped tensors exist again while it runs backward
uniform    of every `recompute_num_layers` sublayers only the first one's input is kept; such a group is rebuilt
           as a whole, so one group's full footprint is added once. MTP keeps its two inputs
block      the first `recompute_num_layers` sublayers of every model chunk keep their input only, the others
           everything; MTP is not recomputed (megatron-core skips it with this method)
"""

from dataclasses import dataclass

from megatron_q3n.config import RunConfig
from megatron_q3n.config.sizes import MTP_PATTERN
from megatron_q3n.planner.activations import Footprint, Local, head, mtp_join, sublayer


@dataclass(frozen=True)
class Need:
    """Bytes kept per micro-batch in flight, and the largest that exist besides while one piece runs backward."""

    kept: float
    working: float


def segment_need(config: RunConfig, segment: str) -> Need:
    """Return what one micro-batch needs in one model chunk, given as megatron-core's symbols."""
    footprints = [sublayer(config, symbol) for symbol in segment]
    training, hidden = config.training, Local.of(config).hidden(config.model)
    if training.recompute_granularity != "full":
        return _selective(footprints, frozenset(training.recompute_modules))
    length = training.recompute_num_layers
    assert length, "full recompute without recompute_num_layers passed validation"
    if training.recompute_method == "uniform":
        groups = [footprints[i : i + length] for i in range(0, len(footprints), length)]
        return Need(hidden * len(groups), max(_rebuilt(group) for group in groups))
    rebuilt, stored = footprints[:length], _selective(footprints[length:], frozenset())
    working = max((_rebuilt([footprint]) for footprint in rebuilt), default=0.0)
    return Need(hidden * len(rebuilt) + stored.kept, max(working, stored.working))


def end_need(config: RunConfig) -> Need:
    """Return what one micro-batch needs on the last stage beyond its sublayers: MTP depths, and a head for each loss.

    All heads' softmaxes are kept together: megatron-core runs MTP's losses in the forward pass.
    """
    model, training, output = config.model, config.training, head(config)
    depth = [mtp_join(config), *(sublayer(config, symbol) for symbol in MTP_PATTERN)]
    if training.recompute_granularity == "full" and training.recompute_method == "uniform":
        one_depth = Need(2 * Local.of(config).hidden(model), _rebuilt(depth))
    else:
        one_depth = _selective(depth, frozenset(training.recompute_modules))
    heads = (1 + model.mtp_num_layers) * output.kept()
    working = max(output.working(), one_depth.working if model.mtp_num_layers else 0.0)
    return Need(heads + model.mtp_num_layers * one_depth.kept, working)


def _selective(footprints: list[Footprint], modules: frozenset[str]) -> Need:
    working = max((footprint.working(modules) for footprint in footprints), default=0.0)
    return Need(sum(footprint.kept(modules) for footprint in footprints), working)


def _rebuilt(group: list[Footprint]) -> float:
    """Return the bytes of a group of sublayers rebuilt for its backward pass."""
    return sum(f.kept() for f in group) + max(f.transient for f in group)
