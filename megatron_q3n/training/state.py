"""Everything that changes while training, in one place: what a checkpoint must hold."""

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
    """A model in training. `step` counts finished optimizer steps; the data position follows from it alone."""

    config: RunConfig
    device: Device
    parallel: Parallel
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    # 1 / the global batch's predictions: every gradient is born divided. Stays where it is in memory (step_graph.py)
    loss_scale: torch.Tensor
    graph: StepGraph | None = None
    step: int = 0
    skipped_steps: int = 0
    loss: float = float("nan")  # of the step under way, before its update

    @property
    def models(self) -> list[nn.Module]:
        """The bare models inside their DDP wrappers."""
        return [chunk.module for chunk in self.chunks]

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.config.tokens_per_step

    @cached_property
    def expert_weights(self) -> list[torch.Tensor]:
        """Every expert stack of this rank, frozen ones too."""
        modules = [module for model in self.models for module in model.modules()]
        return [p for m in modules if isinstance(m, StackedExperts) for p in m.parameters()]

    def gather_parameters(self) -> None:
        """Bring every parameter up to date now, as a checkpoint needs them.

        With overlap_param_gather an optimizer step updates only this rank's share; the rest follows
        during the next forward pass. A collective call.
        """
        if self.config.parallel.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def set_step(self, step: int) -> None:
        """Move to a step: the schedule is a function of it."""
        self.step = step
        self.schedule.num_steps = 0
        self.schedule.step(step)


def build_state(config: RunConfig, device: Device, parallel: Parallel) -> TrainState:
    """Build model, DDP and optimizer, freshly initialised."""
    chunks = build_chunks(config, device, parallel)
    optimizer = build_optimizer(chunks, config)
    _give_torch_adam_its_state(optimizer)
    return connect(config, device, parallel, chunks, optimizer, build_schedule(optimizer, config, 0))


def connect(
    config: RunConfig, device: Device, parallel: Parallel, chunks: list[Any], optimizer: Any, schedule: Any
) -> TrainState:
    """Put a state together from its parts (benchmarks of forward and backward passes bring no optimizer)."""
    loss_scale = torch.ones(1, device=torch.cuda.current_device())
    chunks[0].module.config.grad_scale_func = lambda loss: loss * loss_scale
    required = config.training.cuda_graph is True
    graph = StepGraph(chunks, required=required) if uses_graph(config, device.is_cuda) else None
    return TrainState(config, device, parallel, chunks, optimizer, schedule, loss_scale, graph)


def build_chunks(config: RunConfig, device: Device, parallel: Parallel) -> list[Any]:
    """Build the model chunks in their DDP wrappers: all that forward and backward passes need."""
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
    # Later pipeline chunks go in one bucket, whose communication is small: megatron-core's way. Not over
    # gloo: its coalesced gather mixes the fp32 and bf16 parts of that bucket and spoils the weights.
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
            _wait_where_parts_are_read(chunk)
    _connect_schedules(chunks, config)
    return chunks


def _wait_where_parts_are_read(chunk: DistributedDataParallel) -> None:
    """Let mixers and expert stacks wait for all their parameters when they are entered.

    With overlap_param_gather, DDP waits for a parameter when the module that owns it is called
    (distributed_data_parallel.py:432). These read weights of parts that they never call.
    """

    def wait(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters():
            if not parameter.requires_grad:  # frozen: nothing to wait for
                continue
            group = chunk.param_to_bucket_group[parameter]
            group.finish_param_sync(skip_next_bucket_dispatch=chunk.ddp_config.align_param_gather)

    for module in chunk.modules():
        if isinstance(module, GatedAttention | GatedDeltaNet | StackedExperts):
            module.register_forward_pre_hook(wait)


def _give_torch_adam_its_state(optimizer: MegatronOptimizer) -> None:
    """Make the moments that torch's AdamW would make in its first step.

    megatron-core describes an optimizer to checkpoints by the state it finds and asserts one
    `step` in it (distrib_optimizer.py:838); so a run can be saved before its first step, and loaded.
    """
    for adam, parameter in torch_adam_states(optimizer):
        adam.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def _finalize(chunks: list[Any], _: torch.Tensor | None, **options: Any) -> None:
    """Reduce gradients. They are divided by the token count already (TrainState.loss_scale), which spares a pass
    over the fp32 gradients: 8 bytes a parameter."""
    for chunk in chunks:
        for buffer in chunk.expert_parallel_buffers:
            for weight in buffer.params:
                grouped_linear.settle(weight)
    finalize_model_grads(chunks, None, **options)


def _accumulate_in_place(chunk: DistributedDataParallel) -> None:
    """Let TransformerEngine's linears add their weight gradients to the fp32 main gradients themselves.

    Not through TransformerConfig.gradient_accumulation_fusion: megatron-core's own linears, for the
    head and β/α, would then ask for an apex kernel.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _overwrite_expert_gradients(chunk: DistributedDataParallel) -> None:
    """Let each step's first pass overwrite the experts' main gradients, instead of clearing them before it.

    They are nearly all of a sparse model's. Not where gradients are reduced while the passes run: an expert stack
    that was not used would be reduced stale.
    """
    stacks = {id(p) for m in chunk.modules() if isinstance(m, StackedExperts) for p in m.parameters()}
    for buffer in chunk.expert_parallel_buffers:
        assert stacks.issuperset(map(id, buffer.params)), "a parameter that nobody would clear"
        buffer.reset = partial(grouped_linear.mark_stale, buffer.params)


def _connect_schedules(chunks: list[Any], config: RunConfig) -> None:
    """Give megatron-core's pipeline schedules their hooks, which live on the TransformerConfig."""
    hooks = chunks[0].module.config
    hooks.finalize_model_grads_func = _finalize
    single = len(chunks) == 1
    if config.parallel.overlap_grad_reduce:
        hooks.no_sync_func = chunks[0].no_sync if single else [c.no_sync for c in chunks]
    if config.parallel.overlap_param_gather:
        hooks.param_sync_func = chunks[0].start_param_sync if single else [c.start_param_sync for c in chunks]
