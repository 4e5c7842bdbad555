"""Rules of the ExecutionPlan for the mixture of experts: dispatcher, expert-parallel exchange, expert kernels."""

from megatron_q3n.config.decisions import decide, kernel, kernel_obstacle, sublayer_plan, unless, when
from megatron_q3n.config.execution_plan import Decision, Hardware, Kernel, MoEPlan
from megatron_q3n.config.run_sections import RunSections


def moe_plan(config: RunSections, hardware: Hardware) -> MoEPlan:
    """Make the plan of the MoE layers."""
    model, megatron = config.model, config.model.megatron
    has_shared = bool(model.moe_shared_expert_intermediate_size)
    local, exchange = _local_dispatcher(config), _expert_exchange(config)
    permuted_elsewhere = unless(local, "megatron-core's dispatcher permutes the tokens")
    is_bf16_gpu = hardware.device == "cuda" and config.precision.compute == "bf16"
    grouped_gemm = decide(
        "persistent Triton grouped GEMM",
        "torch._grouped_mm" if is_bf16_gpu else "one GEMM per expert",
        kernel_obstacle(config, hardware, Kernel.GROUPED_GEMM),
    )
    plain_shared = when(
        any(megatron.get(name) for name in ("glu_linear_offset", "use_te_activation_func"))
        or megatron.get("activation_func_clamp_value") is not None,
        "model.megatron changes the activation",
    )
    return MoEPlan(
        # consumers of the norm: router, experts, and of the shared expert its input and its gate
        sublayer=sublayer_plan(config, 4 if has_shared else 2, _moe_sublayer_obstacle(config)),
        local_dispatcher=local,
        expert_exchange=exchange,
        symmetric_memory=decide(
            "rows pulled through symmetric memory, no host synchronization",
            "all-gather and reduce-scatter" if exchange else "not used",
            exchange.reason,
            _nodes_obstacle(config, hardware),
            kernel_obstacle(config, hardware, Kernel.EXPERT_EXCHANGE),
        ),
        permutation=kernel("fused permutation", config, hardware, Kernel.PERMUTATION, permuted_elsewhere),
        fused_residual=decide(
            "residual added in the epilogue of the unpermutation",
            "residual added by itself",
            unless(local or exchange, f"megatron-core's dispatcher: {exchange.reason}"),
            unless(has_shared, "there is no shared expert"),
            kernel_obstacle(config, hardware, Kernel.PERMUTATION, Kernel.SHARED_EXPERT_GATE),
        ),
        fp8_experts=decide(
            "FP8 grouped GEMMs, quantization fused into the permutation",
            "experts in precision.compute",
            unless(config.precision.fp8, "precision.fp8 is not set"),
            kernel_obstacle(config, hardware, Kernel.FP8_EXPERTS),
        ),
        grouped_gemm=grouped_gemm,
        grouped_gemm_backend="triton" if grouped_gemm else "torch" if is_bf16_gpu else "loop",
        swiglu=kernel("fused SwiGLU", config, hardware, Kernel.SWIGLU),
        shared_expert_swiglu=kernel("fused SwiGLU", config, hardware, Kernel.SWIGLU, plain_shared),
        shared_expert_gate=kernel("fused gate", config, hardware, Kernel.SHARED_EXPERT_GATE),
    )


def _nodes_obstacle(config: RunSections, hardware: Hardware) -> str | None:
    """Return why the launcher's nodes, where they are known, do not hold whole expert-parallel groups."""
    ep, ranks = config.parallel.expert_model_parallel_size, hardware.ranks_per_node
    return when(ranks is not None and ranks % ep, f"{ep} expert-parallel ranks, and {ranks} ranks on this node")


def _local_dispatcher(config: RunSections) -> Decision:
    layout = config.parallel
    return decide(
        "local dispatcher, no host synchronization",
        "dispatcher between expert-parallel ranks",
        when(layout.expert_model_parallel_size > 1, "experts are spread over ranks"),
        megatron_dispatcher_obstacle(config),
    )


def _expert_exchange(config: RunSections) -> Decision:
    dispatcher = config.parallel.moe_token_dispatcher_type
    return decide(
        "our exchange in training and validation, megatron-core's alltoall dispatcher in generation",
        f"megatron-core's {'alltoall' if dispatcher == 'auto' else dispatcher} dispatcher",
        expert_exchange_obstacle(config),
    )


def expert_exchange_obstacle(config: RunSections) -> str | None:
    """Return why the settings keep expert-parallel ranks from our exchange; None if they do not."""
    layout = config.parallel
    ep, per_node = layout.expert_model_parallel_size, layout.gpus_per_node
    if ep == 1:
        return "there is no expert parallelism"
    if per_node % ep:
        return f"the {ep} expert-parallel ranks are not in one node (parallel.gpus_per_node={per_node})"
    if layout.moe_token_dispatcher_type == "allgather":
        return "parallel.moe_token_dispatcher_type=allgather"
    return megatron_dispatcher_obstacle(config) or varying_tokens(config)


def varying_tokens(config: RunSections) -> str | None:
    """Return why batches differ in their shapes, None if they do not."""
    if config.stage in ("sft", "rl") or (config.stage == "mtp" and config.sft.train):
        return f"stage={config.stage} packs conversations, and shapes differ from batch to batch"
    return when(
        config.data.mask_document_boundaries, "data.mask_document_boundaries=true: shapes differ from batch to batch"
    )


def megatron_dispatcher_obstacle(config: RunSections) -> str | None:
    """Return why only megatron-core's dispatchers serve the settings."""
    layout, megatron = config.parallel, config.model.megatron
    if layout.expert_tensor_parallel_size > 1:
        return "expert tensor parallelism"
    if megatron.get("moe_expert_capacity_factor") is not None:
        return "experts have a capacity factor"
    ep_only = ("alltoall",) if layout.expert_model_parallel_size > 1 else ()
    if layout.moe_token_dispatcher_type in ("flex", *ep_only):
        return f"parallel.moe_token_dispatcher_type={layout.moe_token_dispatcher_type}"
    if megatron.get("moe_shared_expert_overlap"):
        return "the shared expert overlaps with communication"
    if megatron.get("moe_latent_size"):
        return "model.megatron.moe_latent_size is set"
    padded = megatron.get("moe_router_padding_for_quantization") or megatron.get("moe_router_padding_for_fp8")
    return when(padded, "routing is padded for quantization")


def _moe_sublayer_obstacle(config: RunSections) -> str | None:
    """Return why the MoE layer's parts cannot have an alias of the norm each."""
    modules, megatron = config.training.recompute_modules, config.model.megatron
    if "moe" in modules or "shared_experts" in modules:
        return "activation checkpointing of the MoE layer (training.recompute_modules)"
    if megatron.get("moe_shared_expert_overlap"):
        return "the shared expert overlaps with communication"
    return when(megatron.get("moe_latent_size"), "model.megatron.moe_latent_size is set")
