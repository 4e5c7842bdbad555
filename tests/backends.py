"""Backends of the correctness tests, and the small model they share.

A correctness test takes the backend as a parameter (fixture `backend`), so that the same test runs on a laptop's CPU
and on the GPU backends that production runs use. `here` is torch in fp32 on the device of the process; the others are
marked `gpu`. A process has one device: a test of CPU and GPU together runs the CPU part in another process
(tests/checkpoint/cpu_ranks.py).

torch is imported late: conftest.py imports this file for every selection of tests.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from megatron_q3n.config import RunConfig, validate

# heads of 128, as the fused delta-rule kernels require; other sizes small and a multiple of 16
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
    # large enough that a lost Adam moment changes the next losses by 10 %, small enough that bf16 changes them by 0.1 %
    "schedule": {"lr": 5e-3, "min_lr": 5e-3, "warmup_steps": 0},
}
# training steps before and after a checkpoint that another process resumes
STEPS_BEFORE, STEPS_AFTER = 24, 4


@dataclass(frozen=True)
class Backend:
    """One implementation of the model, in one compute dtype, on the device of this process."""

    model: str
    compute: str
    alone: Any = None

    @property
    def id(self) -> str:
        """Return the id of a test parameter."""
        return f"gpu-{'te' if self.model == 'transformer_engine' else self.model}-{self.compute}"

    def config(self, settings: dict[str, Any] | None = None) -> RunConfig:
        """Return TINY with other sections, in this compute dtype."""
        return validate({**TINY, "precision": {"compute": self.compute}, **(settings or {})})

    def state(self, settings: dict[str, Any] | None = None) -> Any:
        """Build a training state, whose plan has the kernels that this device and dtype qualify."""
        from megatron_q3n.training.state import build_state  # late: seconds of imports

        config = self.config(settings)
        qualify_kernels(self.alone[0].torch_device, config)
        device, parallel = self.alone
        return build_state(config, replace(device, model_backend=self.model), parallel)


def train(state: Any, steps: int) -> list[float]:
    """Train on random walks and return the losses.

    Random walks are learned fast, so a step with wrong weights or moments changes the next loss. The tokens depend on
    the step alone.
    """
    import torch  # late, as above

    from megatron_q3n.data.batch import causal_batch
    from megatron_q3n.training.step import train_step

    rows, tokens = TINY["training"]["global_batch_size"], TINY["training"]["sequence_length"]
    losses = []
    for _ in range(steps):
        random = torch.Generator().manual_seed(state.step)
        jumps = torch.randint(1, 4, (rows, tokens + 1), generator=random)
        jumps[:, 0] = torch.randint(0, MODEL["vocab_size"], (rows,), generator=random)
        walks = jumps.cumsum(1) % MODEL["vocab_size"]
        inputs, labels = walks[:, :-1].contiguous(), walks[:, 1:].contiguous()
        losses.append(train_step(state, [causal_batch(inputs, labels, torch.ones(rows, tokens))]).loss)
    return losses


def qualify_kernels(torch_device: Any, config: RunConfig) -> dict[str, str]:
    """Qualify kernels as a run does, for models that are built afterwards; return the verdicts."""
    from megatron_q3n.kernels.startup.qualification import qualify  # late, as above
    from megatron_q3n.model.transformer_config import compute_dtype

    return qualify(config, torch_device, compute_dtype(config))


HERE = Backend("torch", "fp32")
GPU_TORCH = Backend("torch", "fp32")
GPU_TORCH_BF16 = Backend("torch", "bf16")
GPU_TE = Backend("transformer_engine", "bf16")


def on_every_backend(*here: pytest.MarkDecorator) -> list[Any]:
    """Return the parameters of the fixture `backend`; the marks apply to the one that needs no GPU."""
    gpus = [pytest.param(gpu, id=gpu.id, marks=pytest.mark.gpu) for gpu in (GPU_TORCH, GPU_TE)]
    return [pytest.param(HERE, id="here", marks=here), *gpus]
