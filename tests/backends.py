"""The backends that the rungs of the correctness ladder are proved on, and the model they share.

A rung takes a backend as a parameter (fixture `backend`), so that what a laptop's CPU proves is said of
the model that ships on a GPU too. `here` is torch in fp32 on whatever device the process has; the others
are marked `gpu`. One process has one device: where a CPU and a GPU must both speak, the CPU does in a
process of its own (tests/checkpoint/cpu_ranks.py).

No torch at the top: conftest.py imports this file for every selection of tests.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from megatron_q3n.config import RunConfig, validate

# heads of 128, for which the fused delta-rule kernels exist; the rest small and a multiple of 16
MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "vocab_size": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
TINY: dict[str, Any] = {
    "model": MODEL,
    "data": {"source": "blend", "train": [{"path": "unused"}]},
    "training": {"sequence_length": 32, "steps": 100, "micro_batch_size": 4, "global_batch_size": 4},
    # fast enough that a lost moment moves the next losses by 10 %, slow enough that bf16 moves them by 0.1 %
    "schedule": {"lr": 5e-3, "min_lr": 5e-3, "warmup_steps": 0},
}
STEPS_BEFORE, STEPS_AFTER = 24, 4  # of a checkpoint that goes on elsewhere


@dataclass(frozen=True)
class Backend:
    """One spelling of the model, in one number format, on the device that this process has."""

    model: str
    compute: str
    alone: Any = None

    @property
    def id(self) -> str:
        """A name for a test's parameter."""
        return f"gpu-{'te' if self.model == 'transformer_engine' else self.model}-{self.compute}"

    def config(self, settings: dict[str, Any] | None = None) -> RunConfig:
        """Return TINY with other sections, in this number format."""
        return validate({**TINY, "precision": {"compute": self.compute}, **(settings or {})})

    def state(self, settings: dict[str, Any] | None = None) -> Any:
        """Build a training state. Steps go through the kernels chosen for it until another state is built."""
        from megatron_q3n.training.state import build_state  # late: seconds of imports

        config = self.config(settings)
        qualify_kernels(self.alone[0].torch_device, config)
        device, parallel = self.alone
        return build_state(config, replace(device, model_backend=self.model), parallel)


def train(state: Any, steps: int) -> list[float]:
    """Take steps on random walks, which are learnt fast: a step on wrong weights or moments shows in the next loss.

    The tokens depend on the step alone. Returns: the losses.
    """
    import torch  # late, as above

    from megatron_q3n.data.batch import batch_of_rows
    from megatron_q3n.training.step import train_step

    rows, tokens = TINY["training"]["global_batch_size"], TINY["training"]["sequence_length"]
    losses = []
    for _ in range(steps):
        random = torch.Generator().manual_seed(state.step)
        jumps = torch.randint(1, 4, (rows, tokens + 1), generator=random)
        jumps[:, 0] = torch.randint(0, MODEL["vocab_size"], (rows,), generator=random)
        walks = jumps.cumsum(1) % MODEL["vocab_size"]
        inputs, labels = walks[:, :-1].contiguous(), walks[:, 1:].contiguous()
        losses.append(train_step(state, [batch_of_rows(inputs, labels, torch.ones(rows, tokens))]).loss)
    return losses


def qualify_kernels(torch_device: Any, config: RunConfig) -> dict[str, str]:
    """Choose kernels as a run does, and return which and why."""
    from megatron_q3n.kernels.startup.qualification import qualify  # late, as above
    from megatron_q3n.model.build import compute_dtype

    return qualify(config, torch_device, compute_dtype(config))


HERE = Backend("torch", "fp32")
GPU_TORCH = Backend("torch", "fp32")
GPU_TORCH_BF16 = Backend("torch", "bf16")
GPU_TE = Backend("transformer_engine", "bf16")


def on_every_backend(*here: pytest.MarkDecorator) -> list[Any]:
    """Return the parameters of the fixture `backend`; the marks are for the one that needs no GPU."""
    gpus = [pytest.param(gpu, id=gpu.id, marks=pytest.mark.gpu) for gpu in (GPU_TORCH, GPU_TE)]
    return [pytest.param(HERE, id="here", marks=here), *gpus]
