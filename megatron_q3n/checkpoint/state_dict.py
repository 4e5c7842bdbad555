"""Contents of a checkpoint: megatron-core's sharded state dict of weights, optimizer states and random generators.

Tensors are keyed by parameter, not by rank, so any parallel layout can load them. Data position and learning rate are
functions of the step and are not saved; the optimizer's settings are those of the run that loads. Four defects of
megatron-core 0.19.2 are worked around here. With torch's AdamW, which holds a `step` tensor per parameter, loading
needs the entry to exist, and afterwards all parameters share one. Loading takes over the settings of the saved
parameter groups (`apply_run_settings`). And where gradients are reduced in several buckets, saving reads the optimizer
states at wrong offsets (`_include_bucket_padding`).
"""

import random
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_q3n.training.optimizer import torch_adam_states
from megatron_q3n.training.state import TrainState


def sharded_state_dict(state: TrainState, *, loading: bool, with_optimizer: bool = True) -> dict[str, Any]:
    """Return the sharded state dict of everything that a resume needs. A collective call."""
    if not loading:
        state.gather_parameters()
    metadata = {
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": state.parallel.groups.dp_cp,
    }
    models = {
        f"model{index}": model.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        for index, model in enumerate(state.models)
    }
    content: dict[str, Any] = dict(models)
    if with_optimizer:
        _initialize_adam_states(state)
        _set_step_of_empty_adams(state)
        if not loading:
            _include_bucket_padding(state)
        content["optimizer"] = state.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
    content["rng"] = ShardedObject(
        "rng", None if loading else _rng_states(), (state.parallel.world_size,), (state.parallel.rank,)
    )
    return content


def apply_run_settings(state: TrainState, saved: dict[Any, Any]) -> None:
    """Replace the parameter groups of a saved optimizer by this run's with the saved step count, in place.

    Every optimizer setting is then this run's. megatron-core identifies a group by its settings, among them learning
    rates and weight decay (megatron/core/optimizer/optimizer.py:139), fails with a KeyError where a run continues with
    others, and takes betas and epsilon from the saved groups. The moments are saved by parameter, not by group, so
    that other groups can load them (`optimizer.decay_norm_weights`).
    """
    # one optimizer, or several chained
    saved_parts = [saved] if "optimizer" in saved else [part for _, part in sorted(saved.items())]
    own_parts = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    for own, part in zip(own_parts, saved_parts, strict=True):
        if own.is_stub_optimizer or not part:
            continue
        # the same in every group that has it
        steps = [{"step": int(group["step"])} for group in part["optimizer"]["param_groups"] if "step" in group]
        step: dict[str, Any] = steps[0] if steps else {}
        part["optimizer"]["param_groups"] = [
            {name: value for name, value in group.items() if name != "params"} | step
            for group in own.optimizer.param_groups
        ]


def separate_step_tensors(state: TrainState) -> None:
    """Give each parameter of torch's AdamW its own `step` tensor.

    After loading they share one, which is incremented once per parameter and step
    (megatron/core/optimizer/distrib_optimizer.py:1027) and makes Adam's bias correction wrong.
    """
    for adam, parameter in torch_adam_states(state.optimizer):
        entry = adam.state.get(parameter)
        if entry:
            entry["step"] = torch.as_tensor(entry["step"], dtype=torch.float32).clone()


def restore_rng_states(states: dict[str, Any]) -> None:
    """Restore every random generator of this rank; those of a CPU are not restored on a GPU, nor the reverse.

    Raises: TypeError, ValueError, LookupError or RuntimeError for what is not the state of a generator.
    """
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if ("cuda" in states) == torch.cuda.is_available():
        get_cuda_rng_tracker().set_states(states["tracker"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])


def _rng_states() -> dict[str, Any]:
    """Return the states as plain values and tensors, so that reading them executes nothing."""
    name, numbers, *position = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": (name, numbers.tolist(), *position),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _include_bucket_padding(state: TrainState) -> None:
    """Count the padding after each bucket as part of it while the optimizer states are gathered.

    get_parameter_state_dp_zero (megatron/core/optimizer/distrib_optimizer.py:1375) removes the padding between buckets
    from the tensors it gathers; sharded_param_state_fully_reshardable (:1790) then slices parameters out of them at
    offsets that include the padding. From the second bucket on it would save master weights and moments of other
    parameters. Any model with an odd-sized vector has such padding (ours: A_log, dt_bias) once it has two buckets: with
    overlapped reduction beyond 40 million parameters, and on a pipeline stage with MTP's copy of the embedding, which
    has its own bucket. Nothing else reads these numbers after the buffers are built.
    """
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        for buffer in [] if part.is_stub_optimizer else part.buffers:
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def _set_step_of_empty_adams(state: TrainState) -> None:
    """Set the step count of torch AdamW instances without parameters: on a pipeline stage of a frozen trunk.

    megatron-core reads the step from the parameters' states, asserts that there is one
    (megatron/core/optimizer/distrib_optimizer.py:838), and saves the first rank's for all ranks. AdamW's state accepts
    a key that is no parameter.
    """
    if state.config.mtp.trunk != "frozen" or state.parallel.world_size == 1:
        return
    adams = {id(adam): adam for adam, _ in torch_adam_states(state.optimizer)}.values()
    steps = [float(entry["step"]) for adam in adams for entry in adam.state.values()]
    max_step = torch.tensor([max(steps, default=0.0)], device=torch.cuda.current_device())
    torch.distributed.all_reduce(max_step, torch.distributed.ReduceOp.MAX)
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        adam = None if part.is_stub_optimizer else part.optimizer
        if isinstance(adam, torch.optim.AdamW) and not any(g["params"] for g in adam.param_groups):
            adam.state["idle"] = {"step": max_step[0].cpu().clone()}


def _initialize_adam_states(state: TrainState) -> None:
    """Create the states that Adam creates in its first step, which megatron-core's saving and loading require.

    (megatron/core/optimizer/distrib_optimizer.py:838, :1223, :1352.) torch's AdamW counts steps per parameter,
    TransformerEngine's per group.
    """
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        for group in [] if part.is_stub_optimizer else part.optimizer.param_groups:
            has_step_per_parameter = isinstance(part.optimizer, torch.optim.AdamW)
            if not has_step_per_parameter:
                group.setdefault("step", 0)
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    part.optimizer.state[parameter] = {
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                        **({"step": torch.tensor(0.0)} if has_step_per_parameter else {}),
                    }
