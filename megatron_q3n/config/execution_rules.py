"""Rules of the ExecutionPlan: the one place that decides which kernel or path a part of the model uses. No torch.

A rule is a call of `_decide`: the fast path, the path otherwise, and the obstacles in the order in which they are
reported. An obstacle is None where nothing prevents the fast path. Tests: `tests/config/test_execution_rules.py`.
"""

from megatron_q3n.config.execution_plan import (
    Decision,
    DecodePlan,
    ExecutionPlan,
    GatedAttentionPlan,
    GatedDeltaNetPlan,
    Hardware,
    Kernel,
    KernelStatus,
    MoEPlan,
    SublayerPlan,
)
from megatron_q3n.config.run_sections import RunSections

# Sizes for which the decode kernels exist or are faster; measured on an H200 (tools/benchmarks/LOG.md).
DECODE_MAX_TOKENS = 16  # new tokens per sequence
DECODE_HEAD_DIMS = (16, 32, 64, 128, 256)
DECODE_ROUTER_MAX_EXPERTS, DECODE_ROUTER_MAX_TOPK = 512, 16
DRAFT_ARGMAX_MAX_VOCAB = 2**14  # of one program
DECODE_EXPERTS_MAX_COPIED_BYTES = 64 * 2**20  # of the selected experts; about 45 µs of copying
# cuDNN 9.19's attention backward, captured at 255 tokens, copies from a freed host buffer; 256, 384, … are correct
GRAPH_SEQUENCE_MULTIPLE = 128

REFERENCE = "torch reference"


def execution_plan(config: RunSections, hardware: Hardware) -> ExecutionPlan:
    """Make the plan of a model in this process."""
    moe = _moe(config, hardware)
    return ExecutionPlan(
        norm=_kernel("fused Triton RMSNorm", config, hardware, Kernel.RESIDUAL_NORM),
        gated_delta_net=_gated_delta_net(config, hardware),
        gated_attention=_gated_attention(config, hardware),
        moe=moe,
        decode=_decode(config, hardware, moe),
        training_step=_training_step(config, hardware),
    )


def assumed_hardware(config: RunSections) -> Hardware:
    """Return the hardware that a dry run assumes: a GPU on which every kernel passes qualification."""
    uses_te = config.model.backend != "torch" and config.precision.compute != "fp32"
    return Hardware("cuda", "transformer_engine" if uses_te else "torch", KernelStatus(frozenset(Kernel)))


def step_graph_obstacle(config: RunSections) -> str | None:
    """Return why the settings keep a training step from becoming one CUDA graph; None if they do not."""
    layout = config.parallel
    if layout.model_parallel_size * layout.expert_model_parallel_size > 1:
        return "tensor, pipeline, context and expert parallelism communicate inside the passes"
    if layout.expert_tensor_parallel_size > 1:
        return "expert tensor parallelism communicates inside the passes"
    if layout.overlap_grad_reduce:
        return "parallel.overlap_grad_reduce=true communicates inside the passes"
    if config.stage in ("sft", "rl") or (config.stage == "mtp" and config.sft.train):
        return f"stage={config.stage} packs conversations, and shapes differ from batch to batch"
    if config.data.mask_document_boundaries:
        return "data.mask_document_boundaries=true: shapes differ from batch to batch"
    if config.training.recompute_granularity is not None:
        return "activation checkpointing saves and restores RNG states on the host"
    if config.training.sequence_length % GRAPH_SEQUENCE_MULTIPLE:
        return (
            f"training.sequence_length={config.training.sequence_length} is not a multiple of "
            f"{GRAPH_SEQUENCE_MULTIPLE}, and there cuDNN's attention copies from the host"
        )
    return None


def _decide(fast: str, otherwise: str, *obstacles: str | None) -> Decision:
    """Return the fast path unless there is an obstacle; the first one is the reason."""
    reason = next((obstacle for obstacle in obstacles if obstacle is not None), None)
    return Decision(reason is None, fast if reason is None else otherwise, reason)


def _unless(condition: object, obstacle: str) -> str | None:
    return None if condition else obstacle


def _if(condition: object, obstacle: str) -> str | None:
    return obstacle if condition else None


def _kernel_obstacle(config: RunSections, hardware: Hardware, *kernels: Kernel) -> str | None:
    """Return why these fused kernels may not run."""
    if hardware.device != "cuda":
        return "no GPU"
    if config.precision.compute != "bf16":
        return f"fused kernels compute in bf16, and precision.compute={config.precision.compute}"
    return next((why for kernel in kernels if (why := hardware.kernels.obstacle(kernel))), None)


def _kernel(path: str, config: RunSections, hardware: Hardware, kernel: Kernel, *obstacles: str | None) -> Decision:
    """Decide for a fused kernel against its torch reference."""
    return _decide(path, REFERENCE, *obstacles, _kernel_obstacle(config, hardware, kernel))


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _sublayer(config: RunSections, num_consumers: int, obstacle: str | None = None) -> SublayerPlan:
    """Decide on the norm at a sublayer's head: one alias per consumer, or megatron-core's own path.

    Gradients do not matter: the two paths round differently, and full activation checkpointing, validation and RL's
    log-probs must select the experts of training.
    """
    megatron, modules = config.model.megatron, config.training.recompute_modules
    aliased = _decide(
        "fused norm and residual, " + ("1 consumer" if num_consumers == 1 else f"{num_consumers} consumers"),
        "megatron-core's sublayer",
        obstacle,
        _if(megatron.get("fp32_residual_connection"), "model.megatron.fp32_residual_connection=true"),
        _if(megatron.get("fine_grained_activation_offloading"), "activations are offloaded"),
        _if(megatron.get("mlp_chunks_for_training", 1) > 1, "model.megatron.mlp_chunks_for_training > 1"),
        _if(megatron.get("cuda_graph_impl", "none") != "none", "model.megatron.cuda_graph_impl is set"),
        _if(megatron.get("hidden_dropout", 0.0), "model.megatron.hidden_dropout is not 0"),
        _if("layernorm" in modules, "activation checkpointing of the norm (training.recompute_modules)"),
        _if("mlp" in modules, "activation checkpointing of the MLP (training.recompute_modules)"),
    )
    return SublayerPlan(aliased, num_consumers if aliased else 1)


def _gated_delta_net(config: RunSections, hardware: Hardware) -> GatedDeltaNetPlan:
    model, layout = config.model, config.parallel
    chunks = _unless(
        model.linear_chunk_size == 64, f"model.linear_chunk_size={model.linear_chunk_size}, and the kernel has 64"
    )
    return GatedDeltaNetPlan(
        # consumers of the norm: the large projection, and the one of β and α
        sublayer=_sublayer(config, num_consumers=2),
        fused_mixer=_kernel(
            "fused convolution, gates and output norm",
            config,
            hardware,
            Kernel.GATED_DELTA_MIXER,
            _head_dims_obstacle(config),
        ),
        delta_rule=_decide(
            "flash-linear-attention / FlashQLA chunked kernel",
            "chunked torch reference",
            chunks,
            _kernel_obstacle(config, hardware, Kernel.GATED_DELTA_RULE),
        ),
        context_parallel="none" if layout.context_parallel_size == 1 else layout.linear_context_parallel,
        checkpoints_activations="gated_delta_net" in config.training.recompute_modules,
    )


def _head_dims_obstacle(config: RunSections) -> str | None:
    key, value = config.model.linear_key_head_dim, config.model.linear_value_head_dim
    is_one_size = key == value and _is_power_of_two(key)
    return _unless(is_one_size, f"key and value head dims {key} and {value} are not one power of two")


def _gated_attention(config: RunSections, hardware: Hardware) -> GatedAttentionPlan:
    model, megatron = config.model, config.model.megatron
    tp = config.parallel.tensor_model_parallel_size
    fused_qkv = _kernel(
        "fused split, norm and RoPE (unpacked rows)",
        config,
        hardware,
        Kernel.QKV_NORM_ROPE,
        _if(model.uses_attention_variant, "an attention variant has projections of its own"),
        _if(megatron.get("rotary_interleaved"), "model.megatron.rotary_interleaved=true"),
        _if(megatron.get("no_rope_freq"), "model.megatron.no_rope_freq is set"),
        _if(megatron.get("test_mode"), "model.megatron.test_mode=true"),
        _if(any(name.startswith("yarn_") for name in megatron), "YaRN scales the attention"),
        _unless(model.num_query_groups >= tp, "fewer query groups than tensor-parallel ranks"),
        _unless(_is_power_of_two(model.kv_channels), f"model.kv_channels={model.kv_channels} is no power of two"),
    )
    core = _decide(
        "TransformerEngine DotProductAttention",
        "torch scaled_dot_product_attention",
        _if(hardware.device != "cuda", "no GPU"),
        _unless(hardware.backend == "transformer_engine", "model.backend is torch"),
    )
    masked_gqa = _decide(
        "grouped-query attention with a mask",
        "keys and values repeated for every query head",
        _if(hardware.device == "cuda", "torch's fused attention takes a mask or grouped heads, not both"),
    )
    return GatedAttentionPlan(_sublayer(config, num_consumers=1), fused_qkv, core, masked_gqa)


def _moe(config: RunSections, hardware: Hardware) -> MoEPlan:
    model, megatron = config.model, config.model.megatron
    has_shared = bool(model.moe_shared_expert_intermediate_size)
    local = _local_dispatcher(config)
    permuted_elsewhere = _unless(local, "megatron-core's dispatcher permutes the tokens")
    is_bf16_gpu = hardware.device == "cuda" and config.precision.compute == "bf16"
    grouped_gemm = _decide(
        "persistent Triton grouped GEMM",
        "torch._grouped_mm" if is_bf16_gpu else "one GEMM per expert",
        _kernel_obstacle(config, hardware, Kernel.GROUPED_GEMM),
    )
    plain_shared = _if(
        any(megatron.get(name) for name in ("glu_linear_offset", "use_te_activation_func", "add_bias_linear"))
        or megatron.get("activation_func_clamp_value") is not None
        or not megatron.get("gated_linear_unit", True),
        "model.megatron changes the activation",
    )
    return MoEPlan(
        # consumers of the norm: router, experts, and of the shared expert its input and its gate
        sublayer=_sublayer(config, 4 if has_shared else 2, _moe_sublayer_obstacle(config)),
        local_dispatcher=local,
        permutation=_kernel("fused permutation", config, hardware, Kernel.PERMUTATION, permuted_elsewhere),
        fused_residual=_decide(
            "residual added in the epilogue of the unpermutation",
            "residual added by itself",
            _unless(local, f"megatron-core's dispatcher: {local.reason}"),
            _unless(has_shared, "there is no shared expert"),
            _kernel_obstacle(config, hardware, Kernel.PERMUTATION, Kernel.SHARED_EXPERT_GATE),
        ),
        fp8_experts=_decide(
            "FP8 grouped GEMMs, quantization fused into the permutation",
            "experts in precision.compute",
            _unless(config.precision.fp8, "precision.fp8 is not set"),
            _kernel_obstacle(config, hardware, Kernel.FP8_EXPERTS),
        ),
        grouped_gemm=grouped_gemm,
        grouped_gemm_backend="triton" if grouped_gemm else "torch" if is_bf16_gpu else "loop",
        swiglu=_kernel("fused SwiGLU", config, hardware, Kernel.SWIGLU),
        shared_expert_swiglu=_kernel("fused SwiGLU", config, hardware, Kernel.SWIGLU, plain_shared),
        shared_expert_gate=_kernel("fused gate", config, hardware, Kernel.SHARED_EXPERT_GATE),
    )


def _local_dispatcher(config: RunSections) -> Decision:
    layout, megatron = config.parallel, config.model.megatron
    ep = layout.expert_model_parallel_size
    padded = megatron.get("moe_router_padding_for_quantization") or megatron.get("moe_router_padding_for_fp8")
    return _decide(
        "local dispatcher, no host synchronization",
        f"megatron-core {layout.moe_token_dispatcher_type} dispatcher",
        _if(ep > 1, "experts are spread over ranks: token counts are copied to the host"),
        _if(layout.expert_tensor_parallel_size > 1, "expert tensor parallelism"),
        _if(megatron.get("moe_expert_capacity_factor") is not None, "experts have a capacity factor"),
        _if(layout.moe_token_dispatcher_type == "flex", "parallel.moe_token_dispatcher_type=flex"),
        _if(megatron.get("moe_shared_expert_overlap"), "the shared expert overlaps with communication"),
        _if(padded, "routing is padded for quantization"),
    )


def _moe_sublayer_obstacle(config: RunSections) -> str | None:
    """Return why the MoE layer's parts cannot have an alias of the norm each."""
    modules, megatron = config.training.recompute_modules, config.model.megatron
    if "moe" in modules or "shared_experts" in modules:
        return "activation checkpointing of the MoE layer (training.recompute_modules)"
    if megatron.get("moe_shared_expert_overlap"):
        return "the shared expert overlaps with communication"
    return _if(megatron.get("moe_latent_size"), "model.megatron.moe_latent_size is set")


def _decode(config: RunSections, hardware: Hardware, moe: MoEPlan) -> DecodePlan:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    single = _if(tp > 1, "tensor parallelism splits the weights")
    whole = single or _unless(moe.local_dispatcher, f"megatron-core's dispatcher: {moe.local_dispatcher.reason}")
    plain = _router_obstacle(config)
    megatron = model.megatron
    gemm = _kernel(
        "decode GEMM, norm and residual fused",
        config,
        hardware,
        Kernel.DECODE_GEMM,
        single,
        _if(megatron.get("fp32_residual_connection"), "model.megatron.fp32_residual_connection=true"),
        _if(megatron.get("fp8_param") or megatron.get("fp8_param_gather"), "weights are stored in FP8"),
    )
    router = _kernel("decode router", config, hardware, Kernel.DECODE_ROUTER, _decode_router_obstacle(config))
    return DecodePlan(
        gated_delta=_kernel(
            "decode Gated DeltaNet step", config, hardware, Kernel.DECODE_GATED_DELTA, _head_dims_obstacle(config)
        ),
        whole_linear=_decide("weights multiplied without their module", "tensor-parallel linears", single),
        gemm=gemm,
        attention=_decode_attention(config, hardware),
        router=router,
        norm_in_router=_decide("norm in the router's kernel launch", "norm by itself", router.reason, gemm.reason),
        experts=_decide("experts read in place, no permutation", "the training path", whole, plain),
        experts_kernel=_kernel("decode experts", config, hardware, Kernel.DECODE_EXPERTS, whole, plain),
        experts_max_tokens=_decode_experts_max_tokens(config),
        moe_without_host_sync=_decide(
            "experts of any number of tokens without host synchronization",
            "only experts of a few tokens run without host synchronization",
            whole,
            plain,
            _kernel_obstacle(config, hardware, Kernel.PERMUTATION, Kernel.GROUPED_GEMM),
        ),
        argmax=_kernel("decode argmax", config, hardware, Kernel.DECODE_ARGMAX),
        draft_argmax=_kernel(
            "decode argmax",
            config,
            hardware,
            Kernel.DECODE_ARGMAX,
            _if(
                model.vocab_size > DRAFT_ARGMAX_MAX_VOCAB,
                f"torch.argmax spreads more than {DRAFT_ARGMAX_MAX_VOCAB:,} tokens over the GPU",
            ),
        ),
        cuda_graph=_decode_graph(config, hardware),
    )


def _decode_attention(config: RunSections, hardware: Hardware) -> Decision:
    model, megatron = config.model, config.model.megatron
    gate_by_itself = model.attention_gate != "none" and not model.gate_is_in_query_projection
    return _kernel(
        "decode attention (flash-decoding, split-KV)",
        config,
        hardware,
        Kernel.DECODE_ATTENTION,
        _if(gate_by_itself, "the attention gate has a projection of its own"),
        _unless(
            model.attention_gate == "none" or model.attention_gate_activation == "sigmoid",
            f"model.attention_gate_activation={model.attention_gate_activation}",
        ),
        _if(megatron.get("rotary_interleaved"), "model.megatron.rotary_interleaved=true"),
        _if(megatron.get("qk_l2_norm"), "model.megatron.qk_l2_norm=true"),
        _if(megatron.get("add_qkv_bias"), "model.megatron.add_qkv_bias=true"),
        _if(megatron.get("add_bias_linear"), "model.megatron.add_bias_linear=true"),
        _unless(
            model.num_query_groups >= config.parallel.tensor_model_parallel_size,
            "fewer query groups than tensor-parallel ranks: a rank gathers other ranks' projections",
        ),
        _unless(
            model.kv_channels in DECODE_HEAD_DIMS,
            f"model.kv_channels={model.kv_channels} is none of {', '.join(map(str, DECODE_HEAD_DIMS))}",
        ),
    )


def _router_obstacle(config: RunSections) -> str | None:
    """Return why routing is more than a plain top-k of the router's scores."""
    megatron = config.model.megatron
    balancing = config.model.moe_router_load_balancing_type
    if megatron.get("moe_router_force_load_balancing"):
        return "model.megatron.moe_router_force_load_balancing=true"
    if megatron.get("moe_router_force_biased") is not None:
        return "model.megatron.moe_router_force_biased is set"
    if megatron.get("moe_input_jitter_eps"):
        return "model.megatron.moe_input_jitter_eps is set"
    return _if(balancing in ("sinkhorn", "quantile_balancing"), f"routing by {balancing}")


def _decode_router_obstacle(config: RunSections) -> str | None:
    """Return why the decode router does not support this model's routing."""
    model, megatron = config.model, config.model.megatron
    score = megatron.get("moe_router_score_function", "softmax")
    if megatron.get("moe_router_num_groups") or megatron.get("moe_router_group_topk"):
        return "routing by groups of experts"
    if megatron.get("moe_router_enable_expert_bias") and not model.moe_router_enable_expert_bias:
        return "megatron-core's expert bias"
    if model.moe_router_enable_expert_bias and score != "softmax":
        return f"an expert bias with model.megatron.moe_router_score_function={score}"
    if score not in ("softmax", "sigmoid"):
        return f"model.megatron.moe_router_score_function={score}"
    if model.num_moe_experts > DECODE_ROUTER_MAX_EXPERTS:
        return f"more than {DECODE_ROUTER_MAX_EXPERTS} experts"
    if model.moe_router_topk > min(DECODE_ROUTER_MAX_TOPK, model.num_moe_experts):
        return f"more than {DECODE_ROUTER_MAX_TOPK} experts per token"
    if megatron.get("moe_router_dtype", "fp32") != "fp32":
        return f"model.megatron.moe_router_dtype={megatron['moe_router_dtype']}"
    return None


def _decode_experts_max_tokens(config: RunSections) -> int:
    """Return how many tokens at most are cheaper with their experts' weights read (or copied) once per token."""
    model = config.model
    width = model.moe_ffn_hidden_size // config.parallel.expert_tensor_parallel_size
    num_bytes = 3 * width * model.hidden_size * (2 if config.precision.compute == "bf16" else 4)
    return min(DECODE_MAX_TOKENS, DECODE_EXPERTS_MAX_COPIED_BYTES // (model.moe_router_topk * num_bytes))


def _decode_graph(config: RunSections, hardware: Hardware) -> Decision:
    layout = config.parallel
    exchanges = layout.tensor_model_parallel_size * layout.expert_model_parallel_size > 1
    return _decide(
        "CUDA graph of a decode step",
        "eager decode steps",
        _if(hardware.device != "cuda", "no GPU"),
        _if(exchanges, "ranks exchange tokens or activations inside a pass"),
    )


def _training_step(config: RunSections, hardware: Hardware) -> Decision:
    must_be_fused = (Kernel.GATED_DELTA_RULE, Kernel.PERMUTATION, Kernel.GROUPED_GEMM)
    return _decide(
        "one CUDA graph from the third step on, unless its capture touches the host",
        "eager passes",
        _if(hardware.device != "cuda", "no GPU"),
        _if(config.training.cuda_graph is False, "training.cuda_graph=false"),
        next((why for kernel in must_be_fused if (why := hardware.kernels.obstacle(kernel))), None),
        step_graph_obstacle(config),
    )
