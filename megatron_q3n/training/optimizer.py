"""Optimizer (AdamW of megatron-core), weight decay by an explicit rule, and learning-rate schedule.

Parameters with weight decay (`decays`):

| parameters | decayed | why |
|---|---|---|
| matrices: projections, experts, router, embedding, head, conv1d | yes | as usual |
| every norm weight, MTP's too | yes (an option) | zero-centered: decay pulls the scale to 1 |
| A_log, dt_bias | no | 0 is one decay rate among others, not a small one |

megatron-core by default decays q/k norms and no other norm. A norm may be decayed only if its module declares a
zero-centered weight (`check_norms`): a plain scale would be pulled to 0, and with it the layer's output.

The optimizer is always megatron-core's distributed optimizer, also on one process. Its checkpoints are the same for
fp32 and bf16, CPU and GPU; the plain bf16 optimizer cannot save a model with some fp32 parameters at all. Parameters
that are always fp32 are in parameter groups of their own, because megatron-core pairs optimizer states with parameters
wrongly if a group mixes dtypes.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from megatron_q3n.config import RunConfig
from megatron_q3n.model.norms import ZeroCenteredRMSNorm

NORM_WEIGHTS = (
    "input_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "q_layernorm.weight",
    "k_layernorm.weight",
    "out_norm.weight",
    "final_norm.weight",
    "final_layernorm.weight",
    "enorm.weight",
    "hnorm.weight",
)
NEVER_DECAYED = ("A_log", "dt_bias")
ALWAYS_FP32 = ("A_log", "dt_bias", "out_norm.weight")


def decays(parameter: torch.Tensor, name: str, *, decay_norm_weights: bool) -> bool:
    """Return whether weight decay applies to the parameter of this name.

    Raises: AssertionError for a vector without a rule, so that a new parameter is classified deliberately.
    """
    if name.endswith(NEVER_DECAYED):
        return False
    if name.endswith(NORM_WEIGHTS):
        return decay_norm_weights
    assert parameter.dim() >= 2, f"{name}: no decay rule for this vector; add one in training/optimizer.py"
    return True


def check_norms(chunks: list[nn.Module]) -> None:
    """Check that every norm with weight decay is zero-centered.

    TransformerEngine's norms declare it by an attribute, our own by their class.
    Raises: AssertionError naming the first norm that is not.
    """
    for chunk in chunks:
        for name, _ in chunk.named_parameters():
            if not name.endswith(NORM_WEIGHTS):
                continue
            module = chunk.get_submodule(name.rpartition(".")[0])
            is_zero_centered = isinstance(module, ZeroCenteredRMSNorm) or getattr(module, "zero_centered_gamma", False)
            assert is_zero_centered, (
                f"{name} belongs to a {type(module).__name__} and is not zero-centered: decay would pull its scale "
                "to 0, not to 1; make it zero-centered, or set optimizer.decay_norm_weights=false"
            )


def decay_table(chunks: list[nn.Module], config: RunConfig) -> str:
    """Return a table of every parameter with its weight decay and shape, for logs/weight_decay.txt."""
    rule = partial(decays, decay_norm_weights=config.optimizer.decay_norm_weights)
    lines = [
        f"{config.optimizer.weight_decay if rule(p, name) else 0.0:<6g} {tuple(p.shape)!s:<22} {name}"
        for chunk in chunks
        for name, p in chunk.named_parameters()
    ]
    return "\n".join(["decay  shape                  parameter", *lines, ""])


def build_optimizer(chunks: list[nn.Module], config: RunConfig) -> MegatronOptimizer:
    """Build AdamW for DDP-wrapped model chunks, with parameter groups by decay and dtype.

    Raises: AssertionError if a norm that is not zero-centered would be decayed.
    """
    settings = config.optimizer
    bf16 = config.precision.compute == "bf16"
    megatron = OptimizerConfig(
        optimizer="adam",
        lr=config.schedule.lr,
        min_lr=config.schedule.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap_param_gather,
        log_num_zeros_in_grad=False,
    )
    if settings.decay_norm_weights:
        check_norms(chunks)

    def undecayed(parameter: torch.Tensor, name: str) -> bool:
        return not decays(parameter, name, decay_norm_weights=settings.decay_norm_weights)

    def always_fp32(_: torch.Tensor, name: str) -> bool:
        return name.endswith(ALWAYS_FP32)

    # start_wd and end_wd repeat the default: an override is what makes megatron-core build a separate group
    same = {"start_wd": settings.weight_decay, "end_wd": settings.weight_decay}
    overrides = {
        ParamKey(with_name_predicate=ParamWithNamePredicate(name="undecayed", fn=undecayed)): {"wd_mult": 0.0},
        ParamKey(with_name_predicate=ParamWithNamePredicate(name="always_fp32", fn=always_fp32)): same,
    }
    optimizer = get_megatron_optimizer(megatron, chunks, config_overrides=overrides)
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            _expect_no_step_tensor(part)
    return optimizer


def _expect_no_step_tensor(part: Any) -> None:
    """Make torch's AdamW loadable: its state has a `step` tensor, which a checkpoint's tensors lack.

    Loading (megatron/core/optimizer/distrib_optimizer.py:1223) copies every tensor of the state and would fail on
    `step`, which checkpoint/state_dict.py sets.
    """
    load = part._set_main_param_and_optimizer_states
    part._set_main_param_and_optimizer_states = lambda parameter, tensors: load(parameter, {"step": None, **tensors})


def build_schedule(optimizer: MegatronOptimizer, config: RunConfig, step: int) -> OptimizerParamScheduler:
    """Build the learning-rate schedule, positioned at `step`. It is a function of the step alone and is not saved."""
    schedule, steps = config.schedule, config.training.steps
    wsd, decay = schedule.style == "wsd", schedule.decay(steps)
    horizon = decay if schedule.style == "cosine" and decay else steps
    scheduler = OptimizerParamScheduler(
        optimizer,
        # not 0, so that the first step already learns
        init_lr=schedule.lr / (schedule.warmup_steps + 1),
        max_lr=schedule.lr,
        min_lr=schedule.min_lr,
        lr_warmup_steps=schedule.warmup_steps,
        lr_decay_steps=max(horizon, schedule.warmup_steps + 1),
        lr_decay_style="WSD" if wsd else schedule.style,
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=decay if wsd else None,
        lr_wsd_decay_style=schedule.wsd_decay_style if wsd else None,
    )
    scheduler.step(step)
    return scheduler


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """Return the current learning rate."""
    return float(optimizer.param_groups[0]["lr"])


def torch_adam_states(optimizer: MegatronOptimizer) -> list[tuple[Any, Any]]:
    """Return (torch AdamW, parameter) pairs if megatron-core fell back to torch's AdamW, else an empty list."""
    inner = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [
        (adam, parameter)
        for adam in inner
        if isinstance(adam, torch.optim.AdamW)
        for group in adam.param_groups
        for parameter in group["params"]
    ]
