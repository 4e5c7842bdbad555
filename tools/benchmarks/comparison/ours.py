"""Contestant ours: the code of a training run of this project, without the optimizer.

Model and DDP come from training/state.py, forward and backward from training/step.py; only the tokens and the zeroing
of gradients are done here. In FP8 a run quantizes the experts' weights once per step, independent of the number of
micro-batches. The weights do not change here, so the quantization is timed separately, like an optimizer. Import this
module after the device is chosen: it imports megatron-core.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from megatron_q3n import parallel
from megatron_q3n.config import RunConfig
from megatron_q3n.data.batch import causal_batch
from megatron_q3n.device import Device
from megatron_q3n.kernels.moe import fp8_experts
from megatron_q3n.kernels.startup.qualification import qualify
from megatron_q3n.model.gated_delta_net import GatedDeltaNet
from megatron_q3n.model.transformer_config import compute_dtype
from megatron_q3n.training.state import TrainState, assemble, build_chunks
from megatron_q3n.training.step import run_microbatches
from tools.benchmarks.comparison.tokens import random_rows


class Ours:
    """megatron_q3n, on the backend that the device has."""

    def __init__(self, device: Device, config: RunConfig) -> None:
        self.device, self.group = device, parallel.initialize(config, device)
        kernels = qualify(config, device.torch_device, compute_dtype(config))
        self.about = {"model": device.backends["model"]} | kernels
        self.state: TrainState | None = None

    def build(self, config: RunConfig) -> None:
        """Build a model, initialized from the seed."""
        parallel.seed(config.training.seed)
        chunks = build_chunks(config, self.device, self.group)
        for chunk in chunks:
            chunk.train()
            # as in a run, where the guard checks the norm (training/guard.py)
            chunk.ddp_config.check_for_nan_in_grad = False
        self.state = assemble(config, self.device, self.group, chunks, None, None)
        tokens_BT, labels_BT = random_rows(config, self.device.torch_device)
        mask_BT = tokens_BT.new_ones(tokens_BT.shape).float()
        self.batch = causal_batch(tokens_BT, labels_BT, mask_BT).to(self.device.torch_device)

    def step(self) -> None:
        """Zero the gradients, run forward and backward."""
        assert self.state is not None
        for chunk in self.state.chunks:
            chunk.zero_grad_buffer()
        run_microbatches(self.state, [self.batch], forward_only=False, same_weights=True)

    def quantize_weights(self) -> None:
        """Quantize the experts' weights, as a run does once per step before its passes."""
        assert self.state is not None
        fp8_experts.invalidate_copies(self.state.expert_weights)
        fp8_experts.quantize_weights(self.state.expert_weights)

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
        """Do nothing: DDP adds each gradient to the main gradients and frees it."""

    def free(self) -> None:
        """Free the model."""
        self.state = None


def _mix(layer: Any, hidden_TBH: Tensor) -> Tensor:
    return layer(hidden_states=hidden_TBH, attention_mask=None)[0]
