"""Activation memory of a pipeline rank under activation checkpointing (recompute): sublayers × micro-batches in flight.

none       every sublayer saves its full footprint
selective  the recomputed modules' tensors are not saved; those of one sublayer exist again during its backward pass
uniform    of every group of `recompute_num_layers` sublayers only the first one's input is saved; a group is recomputed
           as a whole, so one group's full footprint is added once. MTP saves its two inputs
block      the first `recompute_num_layers` sublayers of every model chunk save their input only, the others everything;
           MTP is not recomputed (megatron-core skips it with this method)
"""

from dataclasses import dataclass

from megatron_q3n.config import RunConfig
from megatron_q3n.config.sizes import MTP_PATTERN
from megatron_q3n.planner.activations import Footprint, LocalSizes, head, mtp_projection, sublayer


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes saved per micro-batch in flight, and the largest additional bytes during one sublayer's backward pass."""

    saved_bytes: float
    backward_bytes: float


def segment_memory(config: RunConfig, segment: str) -> ActivationMemory:
    """Return the activation memory of one micro-batch in one model chunk, given as megatron-core's symbols."""
    footprints = [sublayer(config, symbol) for symbol in segment]
    training, hidden = config.training, LocalSizes.of(config).hidden(config.model)
    if training.recompute_granularity != "full":
        return _selective(footprints, frozenset(training.recompute_modules))
    length = training.recompute_num_layers
    assert length, "full recompute needs recompute_num_layers, which validation checks"
    if training.recompute_method == "uniform":
        groups = [footprints[i : i + length] for i in range(0, len(footprints), length)]
        return ActivationMemory(hidden * len(groups), max(_recomputed_bytes(group) for group in groups))
    recomputed, stored = footprints[:length], _selective(footprints[length:], frozenset())
    backward_bytes = max((_recomputed_bytes([footprint]) for footprint in recomputed), default=0.0)
    return ActivationMemory(hidden * len(recomputed) + stored.saved_bytes, max(backward_bytes, stored.backward_bytes))


def last_stage_memory(config: RunConfig) -> ActivationMemory:
    """Return the activation memory of one micro-batch on the last stage besides its sublayers: MTP, a head per loss.

    The softmaxes of all heads are saved at the same time: megatron-core computes MTP's losses in the forward pass.
    """
    model, training, output = config.model, config.training, head(config)
    depth = [mtp_projection(config), *(sublayer(config, symbol) for symbol in MTP_PATTERN)]
    if training.recompute_granularity == "full" and training.recompute_method == "uniform":
        one_depth = ActivationMemory(2 * LocalSizes.of(config).hidden(model), _recomputed_bytes(depth))
    else:
        one_depth = _selective(depth, frozenset(training.recompute_modules))
    heads = (1 + model.mtp_num_layers) * output.saved_bytes()
    backward_bytes = max(output.backward_bytes(), one_depth.backward_bytes if model.mtp_num_layers else 0.0)
    return ActivationMemory(heads + model.mtp_num_layers * one_depth.saved_bytes, backward_bytes)


def _selective(footprints: list[Footprint], modules: frozenset[str]) -> ActivationMemory:
    backward_bytes = max((footprint.backward_bytes(modules) for footprint in footprints), default=0.0)
    return ActivationMemory(sum(footprint.saved_bytes(modules) for footprint in footprints), backward_bytes)


def _recomputed_bytes(group: list[Footprint]) -> float:
    """Return the bytes of a group of sublayers that is recomputed for its backward pass."""
    return sum(f.saved_bytes() for f in group) + max(f.transient for f in group)
