"""TransformerConfig of a model: our settings in megatron-core's terms, the ExecutionPlan, and the PassState."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.enums import Fp8Recipe
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import init_method_normal

from megatron_q3n.config import RunConfig, launch
from megatron_q3n.config.execution_plan import ExecutionPlan, Hardware
from megatron_q3n.config.execution_rules import execution_plan
from megatron_q3n.kernels import registry
from megatron_q3n.model.pass_state import PassState

BackendName = Literal["torch", "transformer_engine"]


class Qwen3NextTransformerConfig(TransformerConfig):
    """megatron-core's TransformerConfig with the ExecutionPlan and the PassState of the model.

    Every module has it as `self.config`. Copies, deep ones included, share both objects. They are attributes and no
    dataclass fields, so that megatron-core does not compare, print or convert them.
    """

    plan: ExecutionPlan
    pass_state: PassState

    def __init__(self, plan: ExecutionPlan, **fields: Any) -> None:
        super().__init__(**fields)
        self.plan, self.pass_state = plan, PassState()


def transformer_config(config: RunConfig, backend_name: BackendName) -> Qwen3NextTransformerConfig:
    """Translate a RunConfig into megatron-core's configuration; fields of `model.megatron` override."""
    fields = {
        **_architecture(config),
        **_layout(config),
        **_numerics(config),
        **_recompute(config),
        **_fusions(backend_name),
        **config.model.megatron,
    }
    return Qwen3NextTransformerConfig(make_plan(config, backend_name), **fields)


def make_plan(config: RunConfig, backend_name: BackendName) -> ExecutionPlan:
    """Return the ExecutionPlan of a model in this process, with the kernels that have passed qualification so far."""
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    return execution_plan(config, Hardware(device, backend_name, registry.status(), launch.ranks_per_node()))


def _architecture(config: RunConfig) -> dict[str, Any]:
    model = config.model
    init = init_method_normal(model.init_method_std)
    balance = model.moe_router_load_balancing_type
    return {
        "num_layers": model.megatron_num_layers,
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
        # one std for all, as in the released configuration
        "output_layer_init_method": init,
        "init_method_std": model.init_method_std,
        "embedding_init_method_std": model.embedding_init_method_std,
        "linear_conv_kernel_dim": model.linear_conv_kernel_dim,
        "linear_key_head_dim": model.linear_key_head_dim,
        "linear_value_head_dim": model.linear_value_head_dim,
        "linear_num_key_heads": model.linear_num_key_heads,
        "linear_num_value_heads": model.linear_num_value_heads,
        "num_moe_experts": model.num_moe_experts,
        "moe_grouped_gemm": True,
        "moe_router_topk": model.moe_router_topk,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": True,
        # softmax over the top-k experts' logits (norm_topk_prob)
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": balance,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff or None,
        "mtp_num_layers": model.mtp_num_layers or None,
        "mtp_loss_scaling_factor": model.mtp_loss_scaling_factor,
        "mtp_use_repeated_layer": model.mtp_use_repeated_layer,
        "mtp_detach_heads": config.mtp.trunk != "trained",
        "is_hybrid_model": True,
    }


def _layout(config: RunConfig) -> dict[str, Any]:
    layout = config.parallel
    interleaved = layout.virtual_pipeline_model_parallel_size is not None
    return {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "sequence_parallel": layout.uses_sequence_parallel,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline_model_parallel_size,
        "context_parallel_size": layout.context_parallel_size,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel_size,
        "moe_token_dispatcher_type": _megatron_dispatcher(layout.moe_token_dispatcher_type),
        # The default, batched point-to-point, gives wrong results without an error for two interleaved stages.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "variable_seq_lengths": False,
    }


def _megatron_dispatcher(name: str) -> str:
    """Return the dispatcher of passes for which ours are not made."""
    return "alltoall" if name == "auto" else name


def _numerics(config: RunConfig) -> dict[str, Any]:
    precision = config.precision
    dtype = compute_dtype(config)
    fields: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": precision.compute == "bf16",
        "autocast_dtype": dtype,
        # a mean over the global batch's tokens, for any distribution over ranks
        "calculate_per_token_loss": True,
        "deterministic_mode": config.training.deterministic and torch.cuda.is_available(),
        # training/state.py enables it where possible
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "persist_layer_norm": False,
    }
    if precision.fp8:
        fields |= {"fp8": precision.fp8, "fp8_recipe": Fp8Recipe(precision.fp8_recipe).value}
    return fields


def _fusions(backend_name: str) -> dict[str, Any]:
    """Enable TransformerEngine's fused operations if it is the backend."""
    if backend_name != "transformer_engine":
        return {"cross_entropy_loss_fusion": False}
    return {
        # works on the bf16 logits in place, without an fp32 copy
        "cross_entropy_loss_fusion": True,
        "cross_entropy_fusion_impl": "te",
        "moe_router_fusion": True,
        # with expert parallelism; without it, model/moe/token_dispatcher.py permutes tokens
        "moe_permute_fusion": True,
        "apply_rope_fusion": True,
    }


def _recompute(config: RunConfig) -> dict[str, Any]:
    training = config.training
    # GatedDeltaNet implements its own activation checkpointing (recompute): megatron-core's is tied to a check of the
    # variant that limits context parallelism.
    modules = [module for module in training.recompute_modules if module != "gated_delta_net"]
    granularity = training.recompute_granularity
    if granularity == "selective" and not modules:
        granularity = None
    return {
        "recompute_granularity": granularity,
        "recompute_modules": modules or None,
        "recompute_method": training.recompute_method,
        "recompute_num_layers": training.recompute_num_layers,
    }


def compute_dtype(config: RunConfig) -> torch.dtype:
    """Return the dtype of weights and activations."""
    return torch.bfloat16 if config.precision.compute == "bf16" else torch.float32
