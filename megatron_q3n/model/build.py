"""From a RunConfig to model chunks on this rank: megatron-core's config, the pattern with its
pipeline cuts, HybridModel.

Build order on one screen: transformer_config -> pattern -> one HybridModel per virtual pipeline stage.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.enums import Fp8Recipe
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import init_method_normal

from megatron_q3n.config import GATED_ATTENTION, SLIDING_ATTENTION, RunConfig
from megatron_q3n.config.model import MOE
from megatron_q3n.config.sizes import pipeline_segments
from megatron_q3n.model.mtp.loss import MTPLosses
from megatron_q3n.model.sharding import drop_extra_state
from megatron_q3n.model.spec import backend_named, stack_spec


class Qwen3NextModel(HybridModel):
    """HybridModel whose checkpoint does not know which backend wrote it."""

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Describe the parameters to dist_checkpointing, without TransformerEngine's extra state."""
        return drop_extra_state(super().sharded_state_dict(*args, **kwargs))


def build_model(config: RunConfig, backend_name: str, groups: Any) -> list[Qwen3NextModel]:
    """Build this rank's model chunks (one, or one per virtual pipeline stage), initialised from the seed."""
    megatron = transformer_config(config, backend_name)
    if config.model.mtp_num_layers:
        megatron.mtp_losses = MTPLosses(config.model.mtp_num_layers, config.mtp, config.training.steps)
    spec = stack_spec(config, backend_named(backend_name))
    rank, stages = groups.pp.rank(), config.parallel.num_stages
    pipeline_size = config.parallel.pipeline_model_parallel_size
    chunks = []
    for chunk in range(stages // pipeline_size):
        stage = chunk * pipeline_size + rank
        model = Qwen3NextModel(
            megatron,
            spec,
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.model.max_position_embeddings,
            hybrid_layer_pattern=hybrid_pattern(config),
            pre_process=stage == 0,
            post_process=stage == stages - 1,
            position_embedding_type="rope",
            rotary_percent=config.model.rotary_percent,
            rotary_base=config.model.rotary_base,
            share_embeddings_and_output_weights=False,
            pg_collection=groups,
            vp_stage=chunk if stages > pipeline_size else None,
        )
        _check_built(model, config, is_last=stage == stages - 1)
        if model.mtp_process:
            model.mtp.rotary = model.rotary_pos_emb
        chunks.append(model)
    return chunks


def transformer_config(config: RunConfig, backend_name: str) -> TransformerConfig:
    """Translate our settings into megatron-core's; `model.megatron` has the last word on everything else."""
    fields = {
        **_architecture(config),
        **_layout(config),
        **_numerics(config),
        **_recompute(config),
        **_fusions(backend_name),
        **config.model.megatron,
    }
    return TransformerConfig(**fields)


def hybrid_pattern(config: RunConfig) -> str:
    """Return e.g. "GEGE|GE*E/*E": sublayers, `|` between pipeline stages, `/` before each MTP depth.

    The cuts are those the planner reckons with (config/sizes.py).
    """
    main = "|".join(pipeline_segments(config.model, config.parallel.num_stages))
    main = main.replace(SLIDING_ATTENTION, GATED_ATTENTION)  # the layer finds its window itself
    return main + f"/{GATED_ATTENTION}{MOE}" * config.model.mtp_num_layers


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
        "attention_output_gate": model.gate_lies_with_queries,
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
        "output_layer_init_method": init,  # one std for all, as the released configuration says
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
        "moe_router_pre_softmax": False,  # softmax over the chosen experts' logits (norm_topk_prob)
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
        "moe_token_dispatcher_type": layout.moe_token_dispatcher_type,
        # the default, batched point-to-point, is silently wrong for two interleaved stages
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "variable_seq_lengths": False,
    }


def _numerics(config: RunConfig) -> dict[str, Any]:
    precision = config.precision
    dtype = compute_dtype(config)
    fields: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": precision.compute == "bf16",
        "autocast_dtype": dtype,
        "calculate_per_token_loss": True,  # a mean over the global batch's tokens, however they are spread
        "deterministic_mode": config.training.deterministic and torch.cuda.is_available(),
        "gradient_accumulation_fusion": False,  # training/state.py turns it on where it can be
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "persist_layer_norm": False,
    }
    if precision.fp8:
        fields |= {"fp8": precision.fp8, "fp8_recipe": Fp8Recipe(precision.fp8_recipe).value}
    return fields


def _fusions(backend_name: str) -> dict[str, Any]:
    """Turn on TransformerEngine's fused operations where it is there."""
    if backend_name != "transformer_engine":
        return {"cross_entropy_loss_fusion": False}
    return {
        "cross_entropy_loss_fusion": True,  # works on the bf16 logits in place: no copy of them in fp32
        "cross_entropy_fusion_impl": "te",
        "moe_router_fusion": True,
        "moe_permute_fusion": True,  # where experts are spread; model/moe/token_dispatcher.py serves the rest
        "apply_rope_fusion": True,
    }


def _recompute(config: RunConfig) -> dict[str, Any]:
    training = config.training
    # our Gated DeltaNet owns its recompute: megatron-core ties its own to a variant check that
    # limits context parallelism
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
    """Return the format of weights and activations."""
    return torch.bfloat16 if config.precision.compute == "bf16" else torch.float32


def _check_built(model: Qwen3NextModel, config: RunConfig, is_last: bool) -> None:
    """HybridModel leaves MTP out without a word if pattern and mtp_num_layers disagree; and these must be fp32."""
    assert model.mtp_process == (is_last and config.model.mtp_num_layers > 0), "MTP was not built where it belongs"
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias", "out_norm.weight")):
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}"
