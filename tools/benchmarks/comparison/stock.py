"""Contestant stock: megatron-core's own Qwen3-Next, configured for one GPU as its documentation recommends.

GPTModel with the TransformerEngine specs and its Gated DeltaNet over FLA, as in upstream's recipes; every fusion that
0.19.2 offers on this hardware is enabled. Reasons are given beside the settings. Import this module after the device is
chosen: it imports megatron-core, and requires TransformerEngine.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.tensor_parallel import layers as tensor_parallel_layers
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import init_method_normal
from torch import Tensor

from megatron_q3n import parallel
from megatron_q3n.config import GATED_ATTENTION, RunConfig, UserError
from megatron_q3n.device import Device
from tools.benchmarks.comparison.tokens import random_rows


class Stock:
    """megatron-core 0.19.2 with TransformerEngine and FLA. `fields`: TransformerConfig fields set by the user."""

    def __init__(self, device: Device, config: RunConfig, fields: dict[str, Any]) -> None:
        if not device.is_cuda:
            raise UserError(
                "--contestants stock: megatron-core's Gated DeltaNet needs a GPU, TransformerEngine and FLA; "
                "leave stock out on this machine."
            )
        self.device, self.group, self.fields = device, parallel.initialize(config, device), fields
        self.about = {
            "model": "megatron-core GPTModel, TransformerEngine specs, FLA's gated delta rule "
            "(FlashQLA where FLA dispatches to it)",
            "gradients": "fp32 main gradients, accumulated inside TransformerEngine's products",
            "own fields": str(fields or "none"),
        }
        self.chunk: DistributedDataParallel | None = None

    def build(self, config: RunConfig) -> None:
        """Build a model, initialized from the seed."""
        parallel.seed(config.training.seed)
        megatron = TransformerConfig(**{**stock_fields(config), **self.fields})
        model = build_model(megatron, config, self.group.groups)
        model.to(self.device.torch_device)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=config.precision.grad_reduce_in_fp32,
            use_distributed_optimizer=True,
            # upstream's guides disable this extra pass for speed
            check_for_nan_in_grad=False,
        )
        self.chunk = DistributedDataParallel(megatron, ddp, model)
        self.chunk.train()
        megatron.finalize_model_grads_func = finalize_model_grads
        tokens_BT, labels_BT = random_rows(config, self.device.torch_device)
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        self.batch, self.training = ((tokens_BT, positions_BT.contiguous(), labels_BT), config.training)

    def step(self) -> None:
        """Zero the gradients, run forward and backward."""
        assert self.chunk is not None
        self.chunk.zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter([self.batch]),
            model=self.chunk,
            num_microbatches=1,
            seq_length=self.training.sequence_length,
            micro_batch_size=self.training.micro_batch_size,
            decoder_seq_length=self.training.sequence_length,
            forward_only=False,
        )

    def parameters(self) -> int:
        """Count the model's parameters."""
        assert self.chunk is not None
        return sum(p.numel() for p in self.chunk.module.parameters())

    def mixers(self) -> list[Callable[[Tensor], Tensor]]:
        """Return the Gated DeltaNet sublayers, with norm and residual, as functions of hidden states [T,B,H]."""
        assert self.chunk is not None
        return [
            partial(_mix, layer)
            for layer in self.chunk.module.decoder.layers
            if isinstance(layer.self_attention, GatedDeltaNet)
        ]

    def drop_gradients(self) -> None:
        """Do nothing: DDP adds each gradient to the main gradients and frees it."""

    def free(self) -> None:
        """Free the model and its storages.

        A reference in megatron-core's compiled functions keeps the model of every measurement alive: 10 GiB more each
        time on an H200, until the memory is full. Therefore the storages are resized to zero.
        """
        if self.chunk is None:
            return
        buffers = [*self.chunk.buffers, *self.chunk.expert_parallel_buffers]
        stored = [tensor for b in buffers for tensor in (b.param_data, b.grad_data)]
        for tensor in [*stored, *self.chunk.module.parameters()]:
            if tensor is not None:
                tensor.data.untyped_storage().resize_(0)
        self.chunk = None


def build_model(megatron: TransformerConfig, config: RunConfig, groups: Any) -> GPTModel:
    """Build the GPTModel.

    Its head is not a TransformerEngine layer, and refuses fused gradient accumulation without apex. So the head alone
    is built without it, while every other linear layer accumulates in its GEMM.
    """
    fused, available = megatron.gradient_accumulation_fusion, "_grad_accum_fusion_available"
    without_apex = fused and not getattr(tensor_parallel_layers, available)
    if without_apex:
        setattr(tensor_parallel_layers, available, True)
    model = GPTModel(
        megatron,
        get_transformer_block_with_experimental_attention_variant_spec(megatron),
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.model.max_position_embeddings,
        position_embedding_type="rope",
        rotary_percent=config.model.rotary_percent,
        rotary_base=int(config.model.rotary_base),
        share_embeddings_and_output_weights=False,
        pg_collection=groups,
    )
    if without_apex:
        setattr(tensor_parallel_layers, available, False)
        model.output_layer.gradient_accumulation_fusion = False
    return model


def stock_fields(config: RunConfig) -> dict[str, Any]:
    """Return the TransformerConfig fields for a configuration: its dimensions, and the recommended options."""
    model, precision = config.model, config.precision
    pattern = model.mixer_pattern
    if pattern != pattern[:-1].replace(GATED_ATTENTION, "") + GATED_ATTENTION:
        raise UserError(
            f"model.mixer_pattern={pattern}: stock megatron-core has one attention layer at each "
            "period's end; leave stock out, or use e.g. GGG*."
        )
    fp8 = {"fp8": precision.fp8, "fp8_recipe": precision.fp8_recipe} if precision.fp8 else {}
    init = init_method_normal(model.init_method_std)
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.moe_ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "attention_output_gate": model.gate_is_in_query_projection,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": True,
        "layernorm_epsilon": model.layernorm_epsilon,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method": init,
        "output_layer_init_method": init,
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": len(pattern),
        "linear_conv_kernel_dim": model.linear_conv_kernel_dim,
        "linear_key_head_dim": model.linear_key_head_dim,
        "linear_value_head_dim": model.linear_value_head_dim,
        "linear_num_key_heads": model.linear_num_key_heads,
        "linear_num_value_heads": model.linear_num_value_heads,
        "num_moe_experts": model.num_moe_experts,
        "moe_router_topk": model.moe_router_topk,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": True,
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_force_load_balancing": bool(model.megatron.get("moe_router_force_load_balancing", False)),
        # as in upstream's recipes
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_router_fusion": True,
        "apply_rope_fusion": True,
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "cross_entropy_loss_fusion": True,
        "cross_entropy_fusion_impl": "te",
        "gradient_accumulation_fusion": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "bf16": True,
        **fp8,
    }


def _forward_step(batches: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
    tokens_BT, positions_BT, labels_BT = next(batches)
    return model(tokens_BT, positions_BT, None, labels=labels_BT), _mean_loss


def _mean_loss(losses_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = losses_BT.float().mean()
    return loss, {"lm": loss.detach()}


def _mix(layer: Any, hidden_TBH: Tensor) -> Tensor:
    return layer._forward_attention(hidden_TBH, None)[0]
