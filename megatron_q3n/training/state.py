"""TrainState: everything that changes while training, and so all that a checkpoint must hold; and its construction.

Built from model chunks in megatron-core's DDP wrappers, the distributed optimizer and the learning-rate schedule. The
three callbacks of megatron-core's pipeline schedules (reduction of gradients, no_sync, parameter gather) are set here,
on the TransformerConfig.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from megatron_q3n.config import RunConfig
from megatron_q3n.device import Device
from megatron_q3n.kernels.moe import grouped_linear
from megatron_q3n.model.attention.gated_attention import GatedAttention
from megatron_q3n.model.build import build_model
from megatron_q3n.model.gated_delta_net import GatedDeltaNet
from megatron_q3n.model.moe.experts import StackedExperts
from megatron_q3n.model.mtp.loss import freeze_trunk
from megatron_q3n.parallel import Parallel
from megatron_q3n.training.optimizer import build_optimizer, build_schedule, torch_adam_states
from megatron_q3n.training.step_graph import StepGraph, uses_graph


@dataclass
class TrainState:
    """Model, optimizer and progress of a run. `step` counts finished optimizer steps; the position in the data follows
    from it alone."""

    config: RunConfig
    device: Device
    parallel: Parallel
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    # 1 / num_tokens of the global batch, by which the loss is pre-scaled (loss.py); updated in place, because a
    # captured CUDA graph reads it (step_graph.py)
    loss_scale: torch.Tensor
    graph: StepGraph | None = None
    step: int = 0
    skipped_steps: int = 0
    # of the current step, known before its update
    loss: float = float("nan")

    @property
    def models(self) -> list[nn.Module]:
        """The model chunks without their DDP wrappers."""
        return [chunk.module for chunk in self.chunks]

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.config.tokens_per_step

    @cached_property
    def expert_weights(self) -> list[torch.Tensor]:
        """The stacked weights of all experts on this rank, frozen ones included."""
        modules = [module for model in self.models for module in model.modules()]
        return [p for m in modules if isinstance(m, StackedExperts) for p in m.parameters()]

    def gather_parameters(self) -> None:
        """All-gather the parameters now, before they are read outside a training step. A collective call.

        With overlap_param_gather an optimizer step updates only this rank's shard; the others are gathered during the
        next forward pass.
        """
        if self.config.parallel.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def set_step(self, step: int) -> None:
        """Set the number of finished steps, and the learning-rate schedule accordingly."""
        self.step = step
        self.schedule.num_steps = 0
        self.schedule.step(step)


def build_state(config: RunConfig, device: Device, parallel: Parallel) -> TrainState:
    """Build model, DDP wrappers, optimizer and schedule, freshly initialized."""
    chunks = build_chunks(config, device, parallel)
    optimizer = build_optimizer(chunks, config)
    _initialize_torch_adam(optimizer)
    return assemble(config, device, parallel, chunks, optimizer, build_schedule(optimizer, config, 0))


def assemble(
    config: RunConfig, device: Device, parallel: Parallel, chunks: list[Any], optimizer: Any, schedule: Any
) -> TrainState:
    """Assemble a TrainState from its parts, with loss scale and CUDA graph; benchmarks pass None as optimizer."""
    loss_scale = torch.ones(1, device=torch.cuda.current_device())
    model_config = chunks[0].module.config
    model_config.grad_scale_func = lambda loss: loss * loss_scale
    required = config.training.cuda_graph is True
    headroom = config.parallel.expert_capacity_headroom
    graph = StepGraph(chunks, required=required, headroom=headroom) if uses_graph(config, model_config.plan) else None
    return TrainState(config, device, parallel, chunks, optimizer, schedule, loss_scale, graph)


def build_chunks(config: RunConfig, device: Device, parallel: Parallel) -> list[Any]:
    """Build the model chunks in their DDP wrappers, with all that forward and backward passes need."""
    models = build_model(config, device.model_backend, parallel.groups)
    for model in models:
        model.to(device.torch_device)
        if config.mtp.trunk == "frozen":
            freeze_trunk(model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.grad_reduce_in_fp32,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=True,
        check_for_nan_in_grad=True,
    )
    # As in megatron-core, later pipeline chunks have one bucket each. Not with gloo, whose coalesced gather mixes up
    # the fp32 and bf16 parts of such a bucket and corrupts the weights.
    chunks = [
        DistributedDataParallel(model.config, ddp, model, disable_bucketing=index > 0 and device.is_cuda)
        for index, model in enumerate(models)
    ]
    for chunk in chunks:
        chunk.broadcast_params()
        _accumulate_in_place(chunk)
        if not config.parallel.overlap_grad_reduce:
            _overwrite_expert_gradients(chunk)
        if config.parallel.overlap_param_gather:
            _wait_for_gather_at_entry(chunk)
    _set_schedule_functions(chunks, config)
    return chunks


def _wait_for_gather_at_entry(chunk: DistributedDataParallel) -> None:
    """Make mixers and expert stacks wait for the all-gather of all their parameters before their forward pass.

    With overlap_param_gather, DDP waits for a parameter when the module that it is a direct parameter of is called
    (megatron/core/distributed/distributed_data_parallel.py:432). These modules read weights of submodules that they
    never call.
    """

    def wait(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters():
            # frozen parameters are not gathered
            if not parameter.requires_grad:
                continue
            group = chunk.param_to_bucket_group[parameter]
            group.finish_param_sync(skip_next_bucket_dispatch=chunk.ddp_config.align_param_gather)

    for module in chunk.modules():
        if isinstance(module, GatedAttention | GatedDeltaNet | StackedExperts):
            module.register_forward_pre_hook(wait)


def _initialize_torch_adam(optimizer: MegatronOptimizer) -> None:
    """Create the moments that torch's AdamW creates in its first step, so that a run can be saved before it.

    megatron-core derives the optimizer part of a checkpoint from the existing state and asserts that it holds `step`
    (megatron/core/optimizer/distrib_optimizer.py:838).
    """
    for adam, parameter in torch_adam_states(optimizer):
        adam.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def _finalize(chunks: list[Any], _: torch.Tensor | None, **options: Any) -> None:
    """Reduce the gradients over ranks; nothing is divided, the loss is pre-scaled by 1/num_tokens (loss.py)."""
    for chunk in chunks:
        for buffer in chunk.expert_parallel_buffers:
            for weight in buffer.params:
                grouped_linear.clear_if_not_accumulated(weight)
    finalize_model_grads(chunks, None, **options)


def _accumulate_in_place(chunk: DistributedDataParallel) -> None:
    """Fuse gradient accumulation into TransformerEngine's linears: they add to the fp32 main gradients.

    Not by TransformerConfig.gradient_accumulation_fusion, with which megatron-core's own linears (output layer, β/α)
    would need an apex kernel.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _overwrite_expert_gradients(chunk: DistributedDataParallel) -> None:
    """Make the first micro-batch of a step overwrite the experts' main gradients, which saves clearing them before it.

    They are nearly all gradients of a sparse model. Not with overlap_grad_reduce: the stale gradient of an expert stack
    that was not used would be reduced.
    """
    stacks = {id(p) for m in chunk.modules() if isinstance(m, StackedExperts) for p in m.parameters()}
    for buffer in chunk.expert_parallel_buffers:
        assert stacks.issuperset(map(id, buffer.params)), "a parameter whose gradient would never be cleared"
        buffer.reset = partial(grouped_linear.mark_overwrite, buffer.params)


def _set_schedule_functions(chunks: list[Any], config: RunConfig) -> None:
    """Set the functions that megatron-core's pipeline schedules call, which are fields of the TransformerConfig."""
    model_config = chunks[0].module.config
    model_config.finalize_model_grads_func = _finalize
    single = len(chunks) == 1
    if config.parallel.overlap_grad_reduce:
        model_config.no_sync_func = chunks[0].no_sync if single else [c.no_sync for c in chunks]
    if config.parallel.overlap_param_gather:
        model_config.param_sync_func = chunks[0].start_param_sync if single else [c.start_param_sync for c in chunks]
