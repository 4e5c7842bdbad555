"""Settings that change the function of a model's weights, and the values that the Hugging Face format implies.

A checkpoint records its model section with the pass-through `model.megatron`. The Hugging Face format has no field for
most of these settings: transformers, vLLM and SGLang assume one value. An export of any other value would describe
another model than the one trained, so every setting is classified here, and one that is not is taken to change the
function. tests/hf/test_function_settings.py compares the classes with the fields of `ModelConfig` and of
TransformerConfig, and the implied values with the model that is built.
"""

from collections.abc import Iterator
from typing import Any

from megatron_q3n.config import GATED_ATTENTION, SLIDING_ATTENTION, ModelConfig, UserError


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# settings of the model section that config.json or the shapes of the weights describe
DESCRIBED = _names(
    """
    vocab_size hidden_size num_layers mixer_pattern max_position_embeddings layernorm_epsilon
    num_attention_heads num_query_groups kv_channels rotary_percent rotary_base
    linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim
    num_moe_experts moe_router_topk moe_ffn_hidden_size moe_shared_expert_intermediate_size
    mtp_num_layers mtp_use_repeated_layer init_method_std moe_aux_loss_coeff
    """
)
# settings of the model section with one value in the Hugging Face format
IMPLIED: dict[str, Any] = {
    "attention_gate": "elementwise",
    "attention_gate_position": "output",
    "attention_gate_activation": "sigmoid",
    "attention_gate_shared": False,
    "attention_window_tokens": None,
    "moe_router_enable_expert_bias": False,
}
# settings of the model section that do not change the function of trained weights
WITHOUT_EFFECT = _names(
    """
    name backend embedding_init_method_std linear_chunk_size linear_time_step_init
    moe_router_load_balancing_type moe_z_loss_coeff moe_router_normalized_init moe_router_bias_update_rate
    mtp_loss_scaling_factor
    """
)

# fields of TransformerConfig without a setting of ours -> values with the function that the format implies; the first
# is the value in the models that are built
MEGATRON_IMPLIED: dict[str, tuple[Any, ...]] = {
    "activation_func_clamp_value": (None,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "apply_query_key_layer_scaling": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "gated_linear_unit": (True,),
    "glu_linear_offset": (0.0,),
    "heterogeneous_block_specs": (False,),
    "is_hybrid_model": (True,),
    "linear_attention_freq": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_expert_capacity_factor": (None,),
    "moe_expert_rank_capacity_factor": (None,),
    "moe_input_jitter_eps": (None, 0.0),
    "moe_latent_size": (None,),
    "moe_layer_freq": (1,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_pad_expert_input_to_capacity": (False,),
    "moe_router_force_biased": (None, 0.0),
    "moe_router_force_load_balancing": (False,),
    "moe_router_group_topk": (None,),
    "moe_router_num_groups": (None,),
    "moe_router_pre_softmax": (False,),
    "moe_router_quantile_balancing_ema": (0.0,),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_limited_devices": (None,),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_shared_expert_gate": (True,),
    "moe_shared_expert_glu_interleave_size": (None,),
    "moe_token_drop_policy": ("probs",),
    "moe_token_dropping": (False,),
    "mrope_section": (None,),
    "mtp_hybrid_override_pattern": (None,),
    "multi_latent_attention": (False,),
    "no_rope_freq": (None,),
    "qk_l2_norm": (False,),
    "qk_layernorm": (True,),
    "rotary_interleaved": (False,),
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
    "use_mup": (False,),
    "mup_attn_scale_power": (1.0,),
    "mup_base_head_dim": (None,),
    "mup_base_hidden_size": (None,),
    "mup_embedding_mult": (1.0,),
    "mup_output_mult": (1.0,),
    "mup_width_mult": (1.0,),
}

# why a field of TransformerConfig does not change the function of trained weights -> the fields
MEGATRON_WITHOUT_EFFECT: dict[str, frozenset[str]] = {
    reason: _names(names)
    for reason, names in {
        "parallel layout and communication": """
            tensor_parallel_num_weight_shards gtp_weight_remat_size pipeline_model_parallel_comm_backend
            hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank hybrid_context_parallel
            expert_tensor_parallel_num_weight_shards expert_gtp_weight_remat_size tp_comm_overlap tp_comm_bulk_wgrad
            tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag
            tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1
            tp_comm_bootstrap_backend overlap_moe_expert_parallel_comm delay_wgrad_compute
            overlap_dispatch_backward_with_experts_wgrad ep_overlap_early_attn_memory_release variable_seq_lengths
            batch_p2p_sync use_ring_exchange_p2p defer_embedding_wgrad_compute wgrad_deferral_limit
            overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage mtp_standalone
            num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage pipeline_model_parallel_layout
            account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split high_priority_a2a_comm_stream
            moe_shared_expert_overlap moe_enable_deepep moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep
            moe_hybridep_pad_uneven_dispatch_inputs moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms
            moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
            moe_ncclep_static_shape moe_ncclep_zero_copy cp_comm_type symmetric_ar_type nccl_all_reduce_for_prefill
            clone_scatter_output_in_embedding hetereogenous_dist_checkpoint
            """,
        "kernels, fusions and CUDA graphs": """
            gradient_accumulation_fusion cross_entropy_loss_fusion cross_entropy_fusion_impl attention_backend
            flash_attention_version bias_activation_fusion masked_softmax_fusion persist_layer_norm
            memory_efficient_layer_norm bias_dropout_fusion apply_rope_fusion use_fused_weighted_squared_relu
            fused_single_qkv_rope fused_residual_rmsnorm use_transformer_engine_op_fuser
            use_grouped_gemm_for_shared_expert use_grouped_gemm_for_dense_mlp moe_single_grouped_weight
            moe_single_grouped_bias moe_permute_fusion moe_router_fusion use_te_activation_func batch_invariant_mode
            enable_cuda_graph cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps
            external_cuda_graph cuda_graph_impl cuda_graph_modules cuda_graph_scope
            moe_pad_experts_for_cuda_graph_inference
            """,
        "precision of the computation": """
            enable_autocast autocast_dtype fp32_residual_connection attention_softmax_in_fp32
            disable_bf16_reduced_precision_matmul activation_func_fp8_input_store fp8_param fp8_quantizer_factory
            fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_output_proj
            fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red first_last_layers_bf16
            num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 use_kitchen use_kitchen_attention
            kitchen_attention_backend fp4 fp4_recipe fp4_param fp4_quantizer_factory quant_recipe
            moe_router_padding_for_quantization moe_router_padding_for_fp8 disable_parameter_transpose_cache
            """,
        "memory of training": """
            num_microbatches_with_partial_activation_checkpoints deallocate_pipeline_outputs cpu_offloading
            cpu_offloading_num_layers _cpu_offloading_context cpu_offloading_activations cpu_offloading_weights
            cpu_offloading_double_buffering cpu_offloading_retain_pinned_cpu_buffers distribute_saved_activations
            moe_layer_recompute mlp_chunks_for_training fine_grained_activation_offloading offload_modules
            min_offloaded_tensor_size delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
            activation_offload_fraction moe_paged_stash moe_paged_stash_page_size
            moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu
            fine_grained_offloading_max_inflight_offloads
            """,
        "initialization": """
            perform_initialization use_cpu_initialization init_model_with_meta_device use_te_rng_tracker
            """,
        # dropout, gradients, updates of weights, recorded routes
        "active in training only": """
            hidden_dropout attention_dropout mtp_detach_heads qk_clip qk_clip_alpha qk_clip_threshold
            moe_enable_routing_replay
            """,
        "megatron-core's own inference engine, which is not used": """
            inference_cuda_graph_scope flash_decode inference_rng_tracker inference_sampling_seed
            use_inference_optimized_layers inference_fuse_tp_communication inference_disable_triton_nvls_kernels
            inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels
            inference_moe_token_dispatcher_type mlp_chunks_for_prefill
            """,
        "logging and checks": """
            barrier_with_L1_time log_max_attention_logit test_mode moe_per_layer_logging config_logger_dir
            """,
        "layers that the architecture does not have": """
            ffn_hidden_size dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq
            dsa_indexer_skip_topk_offset dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss dsa_kernel_backend
            dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu
            dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 mamba_state_dim mamba_head_dim mamba_num_groups
            mamba_num_heads mamba_training_ssm_states_dtype use_mamba_mem_eff_path
            """,
    }.items()
}


def check_function(config: ModelConfig) -> None:
    """Refuse a model whose function the Hugging Face format does not describe.

    Raises: UserError naming every such setting and the value that the format implies.
    """
    variants = [*_model_variants(config), *_megatron_variants(config)]
    if variants:
        found = ", ".join(f"{setting}={value}" for setting, value, _ in variants)
        implied = ", ".join(f"{setting}={value}" for setting, _, value in variants)
        raise UserError(
            f"{found} cannot be exported: the Hugging Face format has no field for it, so transformers and vLLM "
            f"would run another model than the one trained, with {implied}. Export a model trained with that."
        )


def _model_variants(config: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield setting, value and implied value of the settings whose value the format does not imply."""
    fields = type(config).model_fields
    for name in sorted(fields.keys() - DESCRIBED - WITHOUT_EFFECT - {"megatron"}):
        # the default of a setting that is not classified is the released architecture
        implied = IMPLIED.get(name, fields[name].get_default(call_default_factory=True))
        if (value := getattr(config, name)) != implied:
            yield f"model.{name}", value, implied
    if SLIDING_ATTENTION in config.mixer_pattern:
        plain = config.mixer_pattern.replace(SLIDING_ATTENTION, GATED_ATTENTION)
        yield "model.mixer_pattern", config.mixer_pattern, plain


def _megatron_variants(config: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield the same of the pass-through; a field that is not classified must not be set."""
    without_effect = frozenset().union(*MEGATRON_WITHOUT_EFFECT.values())
    for name, value in config.megatron.items():
        allowed = MEGATRON_IMPLIED.get(name)
        if name not in without_effect and (allowed is None or value not in allowed):
            yield f"model.megatron.{name}", value, allowed[0] if allowed else "megatron-core's default"
