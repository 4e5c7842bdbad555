"""Rules of the ExecutionPlan: the one place that decides which kernel or path a part of the model uses. No torch.

A rule is a call of `decide` (decisions.py). The rules of the mixture of experts are in moe_rules.py. Tests:
`tests/config/test_execution_rules.py`.
"""

from megatron_q3n.config.decisions import decide, is_power_of_two, kernel, kernel_obstacle, sublayer_plan, unless, when
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
)
from megatron_q3n.config.moe_rules import (
    expert_exchange_obstacle,
    megatron_dispatcher_obstacle,
    moe_plan,
    varying_tokens,
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


def execution_plan(config: RunSections, hardware: Hardware) -> ExecutionPlan:
    """Make the plan of a model in this process."""
    moe = moe_plan(config, hardware)
    return ExecutionPlan(
        norm=kernel("fused Triton RMSNorm", config, hardware, Kernel.RESIDUAL_NORM),
        gated_delta_net=_gated_delta_net(config, hardware),
        gated_attention=_gated_attention(config, hardware),
        moe=moe,
        decode=_decode(config, hardware, moe),
        training_step=_training_step(config, hardware, moe),
    )


def assumed_hardware(config: RunSections) -> Hardware:
    """Return the hardware that a dry run assumes: a GPU on which every kernel passes qualification."""
    uses_te = config.model.backend != "torch" and config.precision.compute != "fp32"
    return Hardware("cuda", "transformer_engine" if uses_te else "torch", KernelStatus(frozenset(Kernel)))


def _gated_delta_net(config: RunSections, hardware: Hardware) -> GatedDeltaNetPlan:
    model, layout = config.model, config.parallel
    chunks = unless(
        model.linear_chunk_size == 64, f"model.linear_chunk_size={model.linear_chunk_size}, and the kernel has 64"
    )
    return GatedDeltaNetPlan(
        # consumers of the norm: the large projection, and the one of β and α
        sublayer=sublayer_plan(config, num_consumers=2),
        fused_mixer=kernel(
            "fused convolution, gates and output norm",
            config,
            hardware,
            Kernel.GATED_DELTA_MIXER,
            _head_dims_obstacle(config),
        ),
        delta_rule=decide(
            "flash-linear-attention / FlashQLA chunked kernel",
            "chunked torch reference",
            chunks,
            kernel_obstacle(config, hardware, Kernel.GATED_DELTA_RULE),
        ),
        context_parallel="none" if layout.context_parallel_size == 1 else layout.linear_context_parallel,
        checkpoints_activations="gated_delta_net" in config.training.recompute_modules,
    )


def _head_dims_obstacle(config: RunSections) -> str | None:
    key, value = config.model.linear_key_head_dim, config.model.linear_value_head_dim
    is_one_size = key == value and is_power_of_two(key)
    return unless(is_one_size, f"key and value head dims {key} and {value} are not one power of two")


def _gated_attention(config: RunSections, hardware: Hardware) -> GatedAttentionPlan:
    model, megatron = config.model, config.model.megatron
    tp = config.parallel.tensor_model_parallel_size
    fused_qkv = kernel(
        "fused split, norm and RoPE (unpacked rows)",
        config,
        hardware,
        Kernel.QKV_NORM_ROPE,
        when(model.uses_attention_variant, "an attention variant has projections of its own"),
        when(megatron.get("rotary_interleaved"), "model.megatron.rotary_interleaved=true"),
        when(megatron.get("no_rope_freq"), "model.megatron.no_rope_freq is set"),
        when(megatron.get("test_mode"), "model.megatron.test_mode=true"),
        when(any(name.startswith("yarn_") for name in megatron), "YaRN scales the attention"),
        unless(model.num_query_groups >= tp, "fewer query groups than tensor-parallel ranks"),
        unless(is_power_of_two(model.kv_channels), f"model.kv_channels={model.kv_channels} is no power of two"),
    )
    core = decide(
        "TransformerEngine DotProductAttention",
        "torch scaled_dot_product_attention",
        when(hardware.device != "cuda", "no GPU"),
        unless(hardware.backend == "transformer_engine", "model.backend is torch"),
    )
    masked_gqa = decide(
        "grouped-query attention with a mask",
        "keys and values repeated for every query head",
        when(hardware.device == "cuda", "torch's fused attention takes a mask or grouped heads, not both"),
    )
    return GatedAttentionPlan(sublayer_plan(config, num_consumers=1), fused_qkv, core, masked_gqa)


def _decode(config: RunSections, hardware: Hardware, moe: MoEPlan) -> DecodePlan:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    single = when(tp > 1, "tensor parallelism splits the weights")
    whole = single or unless(moe.local_dispatcher, f"megatron-core's dispatcher: {moe.local_dispatcher.reason}")
    plain = _router_obstacle(config)
    megatron = model.megatron
    gemm = kernel(
        "decode GEMM, norm and residual fused",
        config,
        hardware,
        Kernel.DECODE_GEMM,
        single,
        when(megatron.get("fp32_residual_connection"), "model.megatron.fp32_residual_connection=true"),
        when(megatron.get("fp8_param") or megatron.get("fp8_param_gather"), "weights are stored in FP8"),
    )
    router = kernel("decode router", config, hardware, Kernel.DECODE_ROUTER, _decode_router_obstacle(config))
    return DecodePlan(
        gated_delta=kernel(
            "decode Gated DeltaNet step", config, hardware, Kernel.DECODE_GATED_DELTA, _head_dims_obstacle(config)
        ),
        whole_linear=decide("weights multiplied without their module", "tensor-parallel linears", single),
        gemm=gemm,
        attention=_decode_attention(config, hardware),
        router=router,
        norm_in_router=decide("norm in the router's kernel launch", "norm by itself", router.reason, gemm.reason),
        experts=decide("experts read in place, no permutation", "the training path", whole, plain),
        experts_kernel=kernel("decode experts", config, hardware, Kernel.DECODE_EXPERTS, whole, plain),
        experts_max_tokens=_decode_experts_max_tokens(config),
        moe_without_host_sync=decide(
            "experts of any number of tokens without host synchronization",
            "only experts of a few tokens run without host synchronization",
            whole,
            plain,
            kernel_obstacle(config, hardware, Kernel.PERMUTATION, Kernel.GROUPED_GEMM),
        ),
        argmax=kernel("decode argmax", config, hardware, Kernel.DECODE_ARGMAX),
        draft_argmax=kernel(
            "decode argmax",
            config,
            hardware,
            Kernel.DECODE_ARGMAX,
            when(
                model.vocab_size > DRAFT_ARGMAX_MAX_VOCAB,
                f"torch.argmax spreads more than {DRAFT_ARGMAX_MAX_VOCAB:,} tokens over the GPU",
            ),
        ),
        cuda_graph=_decode_graph(config, hardware),
    )


def _decode_attention(config: RunSections, hardware: Hardware) -> Decision:
    model, megatron = config.model, config.model.megatron
    gate_by_itself = model.attention_gate != "none" and not model.gate_is_in_query_projection
    return kernel(
        "decode attention (flash-decoding, split-KV)",
        config,
        hardware,
        Kernel.DECODE_ATTENTION,
        when(gate_by_itself, "the attention gate has a projection of its own"),
        unless(
            model.attention_gate == "none" or model.attention_gate_activation == "sigmoid",
            f"model.attention_gate_activation={model.attention_gate_activation}",
        ),
        when(megatron.get("rotary_interleaved"), "model.megatron.rotary_interleaved=true"),
        when(megatron.get("qk_l2_norm"), "model.megatron.qk_l2_norm=true"),
        unless(
            model.num_query_groups >= config.parallel.tensor_model_parallel_size,
            "fewer query groups than tensor-parallel ranks: a rank gathers other ranks' projections",
        ),
        unless(
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
    return when(balancing in ("sinkhorn", "quantile_balancing"), f"routing by {balancing}")


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
    return decide(
        "CUDA graph of a decode step",
        "eager decode steps",
        when(hardware.device != "cuda", "no GPU"),
        when(exchanges, "ranks exchange tokens or activations inside a pass"),
    )


def step_graph_obstacle(config: RunSections) -> str | None:
    """Return why the settings keep a training step from becoming one CUDA graph; None if they do not."""
    layout, sequence = config.parallel, config.training.sequence_length
    # between context-parallel ranks, attention runs on halves of a rank's part
    chunks = 2 * layout.context_parallel_size if layout.context_parallel_size > 1 else 1
    multiple = chunks * GRAPH_SEQUENCE_MULTIPLE
    if layout.pipeline_model_parallel_size > 1:
        return "pipeline parallelism sends and receives between the passes"
    if layout.expert_tensor_parallel_size > 1:
        return "expert tensor parallelism: megatron-core's dispatcher copies token counts to the host"
    dispatched_by_us = (
        expert_exchange_obstacle if layout.expert_model_parallel_size > 1 else megatron_dispatcher_obstacle
    )
    if why := dispatched_by_us(config):
        return f"megatron-core's dispatcher copies token counts to the host: {why}"
    if layout.tensor_model_parallel_size > 1 and draws_random_numbers(config):
        return "tensor-parallel ranks switch RNG states for random numbers inside the passes"
    if layout.tensor_model_parallel_size * layout.context_parallel_size > 1 and not config.training.cuda_graph:
        return "captured collectives of tensor and context parallelism are not measured yet; training.cuda_graph=true"
    if layout.overlap_grad_reduce:
        return "parallel.overlap_grad_reduce=true reduces gradients inside the passes"
    return (
        varying_tokens(config)
        or _checkpointing_obstacle(config)
        or when(
            sequence % multiple,
            f"training.sequence_length={sequence} is not a multiple of {multiple}, and there cuDNN's attention copies "
            "from the host",
        )
    )


def draws_random_numbers(config: RunSections) -> bool:
    """Return whether a pass draws random numbers, which activation checkpointing must draw again."""
    megatron = config.model.megatron
    drawing = ("hidden_dropout", "attention_dropout", "moe_input_jitter_eps")
    return any(megatron.get(name) for name in drawing) or megatron.get("moe_router_force_biased") is not None


def _checkpointing_obstacle(config: RunSections) -> str | None:
    if config.training.recompute_granularity is None:
        return None
    if config.precision.fp8:
        return "TransformerEngine's activation checkpointing in FP8 saves and restores RNG states on the host"
    return when(draws_random_numbers(config), "activation checkpointing saves and restores RNG states on the host")


def _training_step(config: RunSections, hardware: Hardware, moe: MoEPlan) -> Decision:
    must_be_fused = (Kernel.GATED_DELTA_RULE, Kernel.PERMUTATION, Kernel.GROUPED_GEMM)
    return decide(
        "one CUDA graph from the third step on, unless its capture touches the host",
        "eager passes",
        when(hardware.device != "cuda", "no GPU"),
        when(config.training.cuda_graph is False, "training.cuda_graph=false"),
        next((why for needed in must_be_fused if (why := hardware.kernels.obstacle(needed))), None),
        step_graph_obstacle(config),
        moe.symmetric_memory.reason if config.parallel.expert_model_parallel_size > 1 else None,
    )
