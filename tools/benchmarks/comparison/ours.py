"""The contestant this project is: the code of a training run, without its optimizer.

Model and DDP come from training.state, forward and backward from training.step; only zeroing the gradients and
the tokens are done here. In FP8 a run quantises the experts' weights once a step, however many micro-batches it has; as
nothing here changes the weights, that is timed apart, like the optimizer. Import it after the device is chosen: it
imports megatron-core.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from megatron_q3n import parallel
from megatron_q3n.config import RunConfig
from megatron_q3n.data.batch import batch_of_rows
from megatron_q3n.device import Device
from megatron_q3n.kernels.moe import fp8_experts
from megatron_q3n.kernels.startup.qualification import qualify
from megatron_q3n.model.build import compute_dtype
from megatron_q3n.model.gated_delta_net import GatedDeltaNet
from megatron_q3n.training.state import TrainState, build_chunks, connect
from megatron_q3n.training.step import run_microbatches
from tools.benchmarks.comparison.tokens import random_rows


class Ours:
    """megatron_q3n, on the backend that the device has."""

    def __init__(self, device: Device, config: RunConfig) -> None:
        self.device, self.group = device, parallel.initialize(config, device)
        kernels = qualify(config, device.torch_device, compute_dtype(config))
        self.about = {"model": device.choices["model"]} | kernels
        self.state: TrainState | None = None

    def build(self, config: RunConfig) -> None:
        """Build a model, freshly initialised from the seed."""
        parallel.seed(config.training.seed)
        chunks = build_chunks(config, self.device, self.group)
        for chunk in chunks:
            chunk.train()
            # as in a run, whose guard looks at the norm
            chunk.ddp_config.check_for_nan_in_grad = False
        self.state = connect(config, self.device, self.group, chunks, None, None)
        tokens_BT, labels_BT = random_rows(config, self.device.torch_device)
        mask_BT = tokens_BT.new_ones(tokens_BT.shape).float()
        self.batch = batch_of_rows(tokens_BT, labels_BT, mask_BT).to(self.device.torch_device)

    def step(self) -> None:
        """Zero the gradients, run forward and backward."""
        assert self.state is not None
        for chunk in self.state.chunks:
            chunk.zero_grad_buffer()
        run_microbatches(self.state, [self.batch], forward_only=False, same_weights=True)

    def renew_weights(self) -> None:
        """Do what a run does once a step before its passes: quantise the experts' weights."""
        assert self.state is not None
        fp8_experts.forget(self.state.expert_weights)
        fp8_experts.quantise(self.state.expert_weights)

    def parameters(self) -> int:
        """Count the model's parameters."""
        assert self.state is not None
        return sum(p.numel() for model in self.state.models for p in model.parameters())

    def mixers(self) -> list[Callable[[Tensor], Tensor]]:
        """Return the Gated DeltaNet sublayers, with norm and residual, as functions of hidden states [T,B,H]."""
        assert self.state is not None
        layers: Any = self.state.models[0].decoder.layers  # type: ignore[union-attr]
        return [
            partial(_mix, layer)
            for layer in layers
            if isinstance(getattr(layer, "self_attention", None), GatedDeltaNet)
        ]

    def drop_gradients(self) -> None:
        """Do nothing: DDP adds each gradient to the main gradients and drops it."""

    def free(self) -> None:
        """Let go of the model."""
        self.state = None


def _mix(layer: Any, hidden_TBH: Tensor) -> Tensor:
    return layer(hidden_states=hidden_TBH, attention_mask=None)[0]
