"""Memory of a rank that does not depend on the batch: weights, gradient buffers and optimizer states.

Formulas, for P parameters on a rank, replicated on R ranks (R = data × context parallel size for dense weights, the
expert data parallel size for experts; R counts as 1 without the distributed optimizer):

    weights      2 P in bf16, 4 P in fp32
    gradients    4 P with precision.grad_reduce_in_fp32, else as the weights (megatron-core's DDP buffer)
    optimizer    Adam's two moments 8 P / R; in bf16 also the fp32 master weights 4 P / R, and an fp32 copy of the
                 gradients 4 P / R where those are not fp32 already
    fp8 copies   2 P over the matrices multiplied in FP8: TransformerEngine keeps each quantized row-wise and
                 column-wise, besides the bf16 original, from the first micro-batch of a step to its last

A_log and dt_bias are always fp32; at two elements per value head that is not counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_q3n.config import RunConfig
from megatron_q3n.config.sizes import Weight, embedding_weights, head_weights, mtp_weights, sublayer_weights

_FP32 = 4
_MOMENTS = 2 * _FP32
_FP8_COPIES = 2


@dataclass(frozen=True)
class LocalParameters:
    """Number of parameters on one rank: dense ones, replicated on all data-parallel ranks, and those of its experts."""

    dense: int
    experts: int
    low_precision: int
    """Parameters of both whose matrix product runs in FP8 if it is enabled."""

    @property
    def total(self) -> int:
        """Return all parameters on the rank."""
        return self.dense + self.experts


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank that do not depend on the batch."""

    weights: float
    gradients: float
    optimizer: float


def local_parameters(config: RunConfig, segments: list[str], *, first: bool, last: bool) -> LocalParameters:
    """Count the parameters of one rank of a pipeline stage.

    `segments` are the stage's model chunks as megatron-core's symbols; `first` adds the embedding, `last` adds the
    final norm, the head and MTP, and with MTP on a stage of its own a second copy of the embedding.
    """
    model = config.model
    weights = [w for symbol in "".join(segments) for w in sublayer_weights(model, symbol)]
    if first:
        weights += embedding_weights(model)
    if last:
        weights += head_weights(model) + mtp_weights(model)
    if last and not first and model.mtp_num_layers:
        weights += embedding_weights(model)
    return _shard(config, weights)


def _shard(config: RunConfig, weights: Iterable[Weight]) -> LocalParameters:
    """Divide the size of every tensor by the number of ranks that it is sharded over."""
    parallel = config.parallel
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    ranks = {"none": 1, "tensor": parallel.tensor_model_parallel_size, "expert": experts}
    counts = {False: 0, True: 0}
    low_precision = 0
    for weight in weights:
        count = weight.count // ranks[weight.split]
        counts[weight.split == "expert"] += count
        low_precision += count * weight.low_precision
    return LocalParameters(counts[False], counts[True], low_precision)


def state_bytes(config: RunConfig, parameters: LocalParameters) -> StateBytes:
    """Return the bytes of weights (FP8 copies included), gradients and optimizer states; formulas above."""
    precision = config.precision
    weight = 2 if precision.compute == "bf16" else _FP32
    gradient = _FP32 if precision.grad_reduce_in_fp32 else weight
    optimizer = _MOMENTS + (_FP32 if weight < _FP32 else 0) + (_FP32 if gradient < _FP32 else 0)
    dense_ranks, expert_ranks = optimizer_shards(config)
    return StateBytes(
        weights=weight * parameters.total + (_FP8_COPIES * parameters.low_precision if precision.fp8 else 0),
        gradients=gradient * parameters.total,
        optimizer=optimizer * (parameters.dense / dense_ranks + parameters.experts / expert_ranks),
    )


def optimizer_shards(config: RunConfig) -> tuple[int, int]:
    """Return the numbers of ranks that the optimizer states of dense weights and of experts are sharded over."""
    return config.data_parallel_size * config.parallel.context_parallel_size, expert_replicas(config)


def expert_replicas(config: RunConfig) -> int:
    """Return the number of ranks with the same experts (the expert data parallel size)."""
    parallel = config.parallel
    per_copy = (
        parallel.expert_model_parallel_size
        * parallel.expert_tensor_parallel_size
        * parallel.pipeline_model_parallel_size
    )
    return config.world_size // per_copy
