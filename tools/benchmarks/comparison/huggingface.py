"""Contestant transformers: its Qwen3-Next, with flash-linear-attention (FLA) where it is installed.

Weights in bf16, experts by one grouped GEMM (`experts_implementation="grouped_mm"`), attention by torch's scaled dot
product. The convolution is torch's, since transformers uses a fused one only from the causal_conv1d package.
megatron-core is not imported.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as modeling

from megatron_q3n import hf
from megatron_q3n.config import RunConfig
from megatron_q3n.device import Device
from megatron_q3n.hf.published_config import to_published
from tools.benchmarks.comparison.tokens import random_rows

Gradients = Literal["bf16", "fp32"]


class HuggingFace:
    """transformers' model, with gradients in the weights' dtype or accumulated in fp32 buffers as in megatron-core."""

    def __init__(self, device: Device, config: RunConfig, gradients: Gradients) -> None:
        self.device, self.gradients = device, gradients
        rule = "torch's reference, since there is no GPU"
        if device.is_cuda:
            # transformers falls back to slow torch silently; here a missing FLA is an error
            import fla.ops.gated_delta_rule as fla_rule  # late: needs a GPU

            rule = f"FLA {fla_rule.__name__} (FlashQLA where FLA dispatches to it)"
        self.about = {
            "model": f"transformers {modeling.__name__}, grouped_mm experts, sdpa attention",
            "delta rule": rule,
            "gradients": "added to fp32 buffers"
            if gradients == "fp32"
            else f"as the weights, {config.precision.compute}",
        }
        self.model: Any = None
        self.main_gradients: list[Tensor] = []

    def build(self, config: RunConfig) -> None:
        """Build a model on the device, freshly initialized from the seed."""
        torch.manual_seed(config.training.seed)
        # balanced routing, which the format cannot describe, is forced below
        routed = {k: v for k, v in config.model.megatron.items() if k != "moe_router_force_load_balancing"}
        model = config.model.model_copy(update={"megatron": routed})
        published = Qwen3NextConfig(**to_published(model, hf.QWEN3_NEXT))
        dtype = torch.bfloat16 if config.precision.compute == "bf16" else torch.float32
        with torch.device(self.device.torch_device):
            self.model = Qwen3NextForCausalLM._from_config(
                published, dtype=dtype, attn_implementation="sdpa", experts_implementation="grouped_mm"
            )
        self.model.train()
        if config.model.megatron.get("moe_router_force_load_balancing"):
            for module in self.model.modules():
                if isinstance(module, modeling.Qwen3NextTopKRouter):
                    module.__class__ = BalancedRouter
        if self.gradients == "fp32":
            self.main_gradients = [_accumulate_in_fp32(p) for p in self.model.parameters()]
        self.tokens_BT, _ = random_rows(config, self.device.torch_device)

    def step(self) -> None:
        """Zero the gradients, run forward and backward. The loss is transformers' own, over shifted tokens."""
        if self.gradients == "fp32":
            torch._foreach_zero_(self.main_gradients)
        else:
            self.model.zero_grad(set_to_none=True)
        self.model(self.tokens_BT, labels=self.tokens_BT, use_cache=False).loss.backward()

    def parameters(self) -> int:
        """Count the model's parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def mixers(self) -> list[Callable[[Tensor], Tensor]]:
        """Return the Gated DeltaNet sublayers, with norm and residual, as functions of hidden states [T,B,H]."""
        layers = [x for x in self.model.model.layers if hasattr(x, "linear_attn")]
        return [partial(_mix, layer) for layer in layers]

    def drop_gradients(self) -> None:
        """Free the last step's gradients."""
        self.model.zero_grad(set_to_none=True)

    def free(self) -> None:
        """Free the model."""
        self.model, self.main_gradients = None, []


class BalancedRouter(modeling.Qwen3NextTopKRouter):
    """transformers' router over random logits with the gradient of the true logits.

    Equivalent of megatron-core's moe_router_force_load_balancing.
    """

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select experts evenly. Returns: logits [T,E], gates [T,K] and expert indices [T,K]."""
        logits_TE = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        logits_TE = logits_TE + (torch.randn_like(logits_TE) - logits_TE).detach()
        probabilities_TE = torch.softmax(logits_TE, dtype=torch.float, dim=-1)
        gates_TK, experts_TK = torch.topk(probabilities_TE, self.top_k, dim=-1)
        if self.norm_topk_prob:
            gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
        return logits_TE, gates_TK.to(logits_TE.dtype), experts_TK


def _accumulate_in_fp32(parameter: nn.Parameter) -> Tensor:
    """Add each gradient of a parameter to an fp32 buffer once it is computed, and free it. Returns: the buffer."""
    total = torch.zeros_like(parameter, dtype=torch.float32)

    def add(finished: Tensor) -> None:
        assert finished.grad is not None
        total.add_(finished.grad)
        finished.grad = None

    parameter.register_post_accumulate_grad_hook(add)
    return total


def _mix(layer: Any, hidden_TBH: Tensor) -> Tensor:
    hidden_BTH = hidden_TBH.transpose(0, 1)
    mixed_BTH = layer.linear_attn(layer.input_layernorm(hidden_BTH))
    return (hidden_BTH + mixed_BTH).transpose(0, 1)
