"""What a checkpoint holds, as megatron-core's sharded state: weights, master weights and moments, generators.

Tensors are keyed by parameter, not by rank, so any layout can read them. Data position and learning
rate follow from the step and are not saved. Four traps of megatron-core 0.19.2 are dealt with here.
Over torch's AdamW, which keeps a `step` tensor per parameter, loading needs the entry to be there
already, and afterwards all parameters share one. A checkpoint of torch's AdamW lacks settings that
TransformerEngine's needs. And where gradients are reduced in several buckets, saving reads the
optimizer's states at the wrong places (`_count_padding`).
"""

import random
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_q3n.training.optimizer import torch_adam_states
from megatron_q3n.training.state import TrainState


def sharded(state: TrainState, *, loading: bool, with_optimizer: bool = True) -> dict[str, Any]:
    """Return the sharded state dict of everything a resume needs. A collective call."""
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
        _prime_adam(state)
        _tell_idle_adams_the_step(state)
        if not loading:
            _count_padding(state)
        content["optimizer"] = state.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
    content["rng"] = ShardedObject(
        "rng", None if loading else _generators(), (state.parallel.world_size,), (state.parallel.rank,)
    )
    return content


def adopt_schedule(state: TrainState, saved: dict[Any, Any]) -> None:
    """Let a saved optimizer's groups have this run's learning rates, in place.

    megatron-core finds a group by what steers it, its highest and lowest rate included (optimizer.py:139), and
    fails with a KeyError where a run goes on with others. Here all groups have the schedule's.
    """
    rates = {"max_lr": state.config.schedule.lr, "min_lr": state.config.schedule.min_lr}
    parts = [saved] if "optimizer" in saved else saved.values()  # one optimizer, or several chained
    for part in parts:
        for group in part["optimizer"]["param_groups"] if part else []:
            group.update({name: rate for name, rate in rates.items() if name in group})


def mend_loaded_optimizer(state: TrainState) -> None:
    """Make what another machine's Adam left fit this one's.

    A CPU saves torch's AdamW, a GPU TransformerEngine's: loading replaces a parameter group whole, and
    so the settings that only this machine's Adam knows are put back, and steps counted as integers.
    torch's: each parameter gets a `step` tensor of its own, since after loading they share one,
    counted once per parameter and step (distrib_optimizer.py:1027), which silently spoils Adam's
    bias correction.
    """
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        for group in [] if part.is_stub_optimizer else part.optimizer.param_groups:
            for name, value in part.optimizer.defaults.items():
                group.setdefault(name, value)
            if "step" in group:
                group["step"] = int(group["step"])
    for adam, parameter in torch_adam_states(state.optimizer):
        entry = adam.state.get(parameter)
        if entry:
            entry["step"] = torch.as_tensor(entry["step"], dtype=torch.float32).clone()


def restore_generators(states: dict[str, Any]) -> None:
    """Put every random generator of this rank where it was; a CPU's do not fit a GPU, nor a GPU's a CPU."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if ("cuda" in states) == torch.cuda.is_available():
        get_cuda_rng_tracker().set_states(states["tracker"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])


def _generators() -> dict[str, Any]:
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _count_padding(state: TrainState) -> None:
    """Let the padding behind each bucket count as part of it while the optimizer's states are gathered.

    get_parameter_state_dp_zero (distrib_optimizer.py:1375) closes the gaps between buckets in the tensors it
    gathers; sharded_param_state_fully_reshardable (:1790) then cuts parameters out of them by
    positions that count the gaps. From the second bucket on, master weights and moments of other
    parameters were saved. Any model with an odd-sized vector has such gaps (ours: A_log, dt_bias)
    once it has two buckets: with overlapped reduction beyond 40 million parameters, and on a pipeline
    stage with MTP's copy of the embedding, which is a bucket of its own. Nothing else reads these
    numbers after the buffers are built.
    """
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        for buffer in [] if part.is_stub_optimizer else part.buffers:
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def _tell_idle_adams_the_step(state: TrainState) -> None:
    """Let torch's AdamW say how many steps it took where it has no parameter: on a stage of a frozen trunk.

    megatron-core reads the step off the parameters' states and asserts that there is one
    (distrib_optimizer.py:838), and saves the first rank's for all. torch keeps a key that is no parameter.
    """
    if state.config.mtp.trunk != "frozen" or state.parallel.world_size == 1:
        return
    adams = {id(adam): adam for adam, _ in torch_adam_states(state.optimizer)}.values()
    taken = [float(entry["step"]) for adam in adams for entry in adam.state.values()]
    most = torch.tensor([max(taken, default=0.0)], device=torch.cuda.current_device())
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        adam = None if part.is_stub_optimizer else part.optimizer
        if isinstance(adam, torch.optim.AdamW) and not any(g["params"] for g in adam.param_groups):
            adam.state["idle"] = {"step": most[0].cpu().clone()}


def _prime_adam(state: TrainState) -> None:
    """Make what Adam would make in its first step: megatron-core's saving and loading expect to find it.

    (distrib_optimizer.py:838, :1223, :1352.) torch's AdamW counts steps per parameter, TransformerEngine's
    per group.
    """
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        for group in [] if part.is_stub_optimizer else part.optimizer.param_groups:
            by_parameter = isinstance(part.optimizer, torch.optim.AdamW)
            if not by_parameter:
                group.setdefault("step", 0)
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    part.optimizer.state[parameter] = {
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                        **({"step": torch.tensor(0.0)} if by_parameter else {}),
                    }
