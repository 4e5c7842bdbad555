"""Training state small enough to be saved hundreds of times, and a fingerprint of everything that a resume needs.

Used by the tests of this folder, in their process and in forked ones. Imports of megatron-core are late: they take
seconds, and pytest collects this file.
"""

import hashlib
from typing import Any

import torch

from megatron_q3n.config import validate

TINY: dict[str, Any] = {
    "model": {"hidden_size": 32, "num_layers": 4, "vocab_size": 64},
    "data": {"source": "blend", "train": [{"path": "unused"}]},
    "training": {"sequence_length": 32, "steps": 100, "micro_batch_size": 2, "global_batch_size": 2},
}


def state_of(alone: Any, settings: dict[str, Any] | None = None) -> Any:
    """Build a state on the process groups of `alone`."""
    from megatron_q3n.training.state import build_state

    tree = {**TINY, **(settings or {})}
    return build_state(validate(tree), *alone)


def step(state: Any) -> float:
    """Take a step on tokens that depend on the step alone."""
    from megatron_q3n.data.batch import causal_batch
    from megatron_q3n.training.step import train_step

    rows = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(state.step))
    return train_step(state, [causal_batch(rows[:, :-1], rows[:, 1:].contiguous(), torch.ones(2, 32))]).loss


def fingerprint(state: Any) -> str:
    """Return a digest of the step, weights, buffers, master weights, moments and the torch generator."""
    digest = hashlib.sha256(str(state.step).encode())
    tensors = [t for model in state.models for t in [*model.parameters(), *model.buffers()]]
    for part in state.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                moments = part.optimizer.state[parameter]
                tensors += [parameter, moments["exp_avg"], moments["exp_avg_sq"]]
    for tensor in [*tensors, torch.get_rng_state()]:
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
