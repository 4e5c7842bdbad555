"""Predicted step time of a run on H200 GPUs, from measured rates of its kernels.

Time of a micro-batch: every FLOP of `flops_per_token` at the rate of its kernels, the experts' weights and main
gradients at the memory's rate, element-wise kernels per token and layer, and with expert parallelism the exchanged rows
at NVLink's rate. Time of a step: its micro-batches, and the optimizer per parameter. Steps without a CUDA graph are not
predicted, since the host determines their time.

The rates are those of tools/benchmarks/LOG.md (H200, bf16, 16,384 tokens, the released model's width). Measured against
predicted: tests/planner/test_step_time.py.
"""

from dataclasses import dataclass

from megatron_q3n.config import GATED_DELTA_NET, RunConfig
from megatron_q3n.config.execution_rules import assumed_hardware, execution_plan
from megatron_q3n.config.sizes import flops_per_token
from megatron_q3n.planner.states import LocalParameters


@dataclass(frozen=True)
class Rates:
    """Measured rates of one GPU. Units: FLOP/s, bytes/s, seconds."""

    name: str
    matmul: float
    """An 8192³ bf16 GEMM, to which MFU is relative."""
    dense: float
    experts: float
    """Grouped GEMMs, forward, input and weight gradients together."""
    attention: float
    """The core, at head size 256."""
    memory: float
    nvlink: float
    """Rows pulled from a peer."""
    delta_rule_seconds: float
    """Of one token and value head, forward and backward."""
    elementwise_seconds: float
    """Norms, router, permutation, convolution and gates of one token, layer and hidden dimension."""
    optimizer_seconds: float
    """Norm, clipping and update of one parameter of this rank's share."""
    sustained: float
    """Time under sustained load over that of the short runs in which the kernels were measured."""


H200 = Rates("H200", 790e12, 716e12, 530e12, 346e12, 4.3e12, 335e9, 2.54e-9, 125e-9 / 2048, 16.1e-12, 1.1)
# rates of large products do not hold below it: pretrain-small takes twice the time that they give
_LEAST_HIDDEN_SIZE = 1024
# bytes per expert parameter and micro-batch: bf16 weights read twice, fp32 main gradient read and written
_EXPERT_BYTES = 12
# published tokens and partial sums, forward and backward, in bf16
_EXCHANGED_BYTES = 4 * 2


@dataclass(frozen=True)
class StepTime:
    """Prediction: seconds of a step and MFU, or why there is none."""

    seconds: float | None
    mfu: float | None
    reason: str | None = None


def predict(config: RunConfig, local: LocalParameters, rates: Rates = H200) -> StepTime:
    """Predict the step time; `local` counts the parameters of a rank."""
    plan = execution_plan(config, assumed_hardware(config))
    if not plan.training_step:
        return StepTime(None, None, f"steps run without a CUDA graph: {plan.training_step.reason}")
    if config.model.hidden_size < _LEAST_HIDDEN_SIZE:
        return StepTime(None, None, f"no rates for model.hidden_size below {_LEAST_HIDDEN_SIZE:,}")
    if config.precision.fp8 or config.training.recompute_granularity or config.parallel.model_parallel_size > 1:
        return StepTime(None, None, "no rates for FP8, recompute, tensor and context parallelism yet")
    micro = _microbatch_seconds(config, rates) * config.num_microbatches * rates.sustained
    seconds = micro + local.total * rates.optimizer_seconds
    flops = flops_per_token(config.model, config.training.sequence_length).total * config.tokens_per_step
    return StepTime(seconds, flops / config.world_size / seconds / rates.matmul)


def _microbatch_seconds(config: RunConfig, rates: Rates) -> float:
    model, training = config.model, config.training
    ranks = config.parallel.expert_model_parallel_size
    tokens = training.micro_batch_size * training.sequence_length
    flops = flops_per_token(model, training.sequence_length)
    depths = model.num_layers + model.mtp_num_layers
    per_token = (flops.projections + flops.shared_expert + flops.router + flops.head + flops.mtp) / rates.dense
    per_token += flops.routed_experts / rates.experts + flops.attention_core / rates.attention
    heads = model.mixers.count(GATED_DELTA_NET) * model.linear_num_value_heads
    per_token += heads * rates.delta_rule_seconds + depths * model.hidden_size * rates.elementwise_seconds
    # a token goes to every rank that has one of its experts
    remote = (ranks - 1) * (1 - (1 - 1 / ranks) ** model.moe_router_topk)
    per_token += remote * depths * model.hidden_size * _EXCHANGED_BYTES / rates.nvlink
    experts = depths * model.num_moe_experts / ranks * 3 * model.hidden_size * model.moe_ffn_hidden_size
    return tokens * per_token + experts * _EXPERT_BYTES / rates.memory
