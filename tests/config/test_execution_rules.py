"""Rules of the ExecutionPlan, as one table: a setting or a failed kernel, the decision it changes, and the reason.

Not covered here: that layers follow the plan. Sublayers: tests/model; decoding: tests/model/decode; both on a GPU: gpu
tests.
"""

import copy
from operator import attrgetter
from typing import Any

import pytest

from megatron_q3n.config import RunConfig, UserError, validate
from megatron_q3n.config.execution_plan import Decision, ExecutionPlan, Hardware, Kernel, KernelStatus
from megatron_q3n.config.execution_rules import assumed_hardware, execution_plan

BF16 = {"precision": {"compute": "bf16"}}
GPU = Hardware("cuda", "transformer_engine", KernelStatus(frozenset(Kernel)))
CPU = Hardware("cpu", "torch")


def config_of(**sections: Any) -> RunConfig:
    return validate({**BF16, **sections})


def plan_of(hardware: Hardware = GPU, **sections: Any) -> ExecutionPlan:
    return execution_plan(config_of(**sections), hardware)


def decision(plan: ExecutionPlan, path: str) -> Decision:
    found = attrgetter(path)(plan)
    assert isinstance(found, Decision)
    return found


def megatron(**fields: Any) -> dict[str, Any]:
    return {"model": {"megatron": fields}}


def selective(*modules: str) -> dict[str, Any]:
    return {"training": {"recompute_granularity": "selective", "recompute_modules": list(modules)}}


def test_on_a_gpu_where_everything_is_qualified_only_fp8_has_a_reason() -> None:
    slow = {f"{kind}, {part}" for kind, part, found in plan_of().rows() if not found}
    no_peers = {"moe, expert exchange", "moe, symmetric memory"}
    assert slow == {"moe, fp8 experts", "gated attention, masked gqa", *no_peers}


def test_without_a_gpu_every_kernel_is_the_reference() -> None:
    plan = execution_plan(validate({}), CPU)
    fast = {f"{kind}, {part}" for kind, part, found in plan.rows() if found} - {
        "gated delta net, context parallel",
        "gated delta net, checkpoints activations",
        "decode, experts max tokens",
    }
    assert fast == {
        "gated delta net, norm and residual",
        "gated attention, norm and residual",
        "moe, norm and residual",
        "moe, local dispatcher",
        "decode, experts",
        "decode, whole linear",
        "gated attention, masked gqa",
    }
    assert plan.norm.reason == "no GPU"


TWICE = {"training": {"global_batch_size": 8}}
EP2 = {"parallel": {"world_size": 2, "expert_model_parallel_size": 2}, **TWICE}
ALLTOALL = {"parallel": EP2["parallel"] | {"moe_token_dispatcher_type": "alltoall"}, **TWICE}
PP2 = {"parallel": {"world_size": 2, "pipeline_model_parallel_size": 2}}
FP8 = {"precision": {"compute": "bf16", "fp8": "hybrid"}}
TP2 = {"parallel": {"world_size": 2, "tensor_model_parallel_size": 2}}
ETP2 = {"parallel": {"world_size": 2, "expert_tensor_parallel_size": 2}, **TWICE}


@pytest.mark.parametrize(
    ("sections", "path", "reason"),
    [
        # the norm at a sublayer's head
        (megatron(fp32_residual_connection=True), "moe.sublayer.aliased_norm", "fp32_residual_connection"),
        (megatron(hidden_dropout=0.1), "gated_attention.sublayer.aliased_norm", "hidden_dropout"),
        (megatron(mlp_chunks_for_training=2), "moe.sublayer.aliased_norm", "mlp_chunks_for_training"),
        (selective("layernorm"), "gated_delta_net.sublayer.aliased_norm", "activation checkpointing of the norm"),
        (selective("moe"), "moe.sublayer.aliased_norm", "activation checkpointing of the MoE layer"),
        (selective("shared_experts"), "moe.sublayer.aliased_norm", "activation checkpointing of the MoE layer"),
        (megatron(fine_grained_activation_offloading=True), "moe.sublayer.aliased_norm", "activations are offloaded"),
        (megatron(cuda_graph_impl="local"), "gated_attention.sublayer.aliased_norm", "cuda_graph_impl"),
        (megatron(moe_latent_size=64), "moe.sublayer.aliased_norm", "moe_latent_size"),
        (megatron(moe_shared_expert_overlap=True), "moe.sublayer.aliased_norm", "overlaps with communication"),
        # Gated DeltaNet
        (
            {"model": {"linear_key_head_dim": 24, "linear_value_head_dim": 24}},
            "gated_delta_net.fused_mixer",
            "head dims",
        ),
        ({"model": {"linear_key_head_dim": 16, "linear_value_head_dim": 32}}, "decode.gated_delta", "head dims"),
        ({"model": {"linear_chunk_size": 32}}, "gated_delta_net.delta_rule", "linear_chunk_size=32"),
        # gated attention
        ({"model": {"attention_gate": "headwise"}}, "gated_attention.fused_qkv", "attention variant"),
        ({"model": {"attention_gate": "headwise"}}, "decode.attention", "projection of its own"),
        ({"model": {"attention_gate_activation": "silu"}}, "decode.attention", "attention_gate_activation=silu"),
        (megatron(rotary_interleaved=True), "gated_attention.fused_qkv", "rotary_interleaved"),
        (megatron(rotary_interleaved=True), "decode.attention", "rotary_interleaved"),
        (megatron(no_rope_freq=[0, 1]), "gated_attention.fused_qkv", "no_rope_freq"),
        (megatron(test_mode=True), "gated_attention.fused_qkv", "test_mode"),
        ({"model": {"kv_channels": 24}}, "gated_attention.fused_qkv", "kv_channels=24"),
        ({"model": {"kv_channels": 24}}, "decode.attention", "kv_channels=24"),
        ({"model": {"kv_channels": 512}}, "decode.attention", "kv_channels=512"),
        (megatron(qk_l2_norm=True), "decode.attention", "qk_l2_norm"),
        # mixture of experts
        (EP2, "moe.local_dispatcher", "experts are spread over ranks"),
        (ETP2, "moe.local_dispatcher", "expert tensor parallelism"),
        (megatron(moe_expert_capacity_factor=1.0), "moe.local_dispatcher", "capacity factor"),
        (megatron(moe_shared_expert_overlap=True), "moe.local_dispatcher", "overlaps with communication"),
        (megatron(moe_router_padding_for_fp8=True), "moe.local_dispatcher", "padded for quantization"),
        ({"parallel": {"moe_token_dispatcher_type": "flex"}}, "moe.local_dispatcher", "flex"),
        (ALLTOALL, "moe.fused_residual", "moe_token_dispatcher_type=alltoall"),
        (EP2, "moe.permutation", "megatron-core's dispatcher permutes the tokens"),
        (EP2, "decode.experts_kernel", "experts are spread over ranks"),
        (megatron(activation_func_clamp_value=7.0), "moe.shared_expert_swiglu", "changes the activation"),
        (megatron(glu_linear_offset=1.0), "moe.shared_expert_swiglu", "changes the activation"),
        (megatron(use_te_activation_func=True), "moe.shared_expert_swiglu", "changes the activation"),
        # decoding
        (TP2, "decode.whole_linear", "tensor parallelism splits the weights"),
        (TP2, "decode.gemm", "tensor parallelism splits the weights"),
        (TP2, "decode.norm_in_router", "tensor parallelism splits the weights"),
        (TP2, "decode.experts", "tensor parallelism splits the weights"),
        (EP2, "decode.experts", "experts are spread over ranks"),
        (EP2, "decode.moe_without_host_sync", "experts are spread over ranks"),
        (EP2, "decode.cuda_graph", "ranks exchange"),
        (megatron(moe_router_force_load_balancing=True), "decode.experts", "moe_router_force_load_balancing"),
        (megatron(moe_input_jitter_eps=0.1), "decode.experts", "moe_input_jitter_eps"),
        (megatron(moe_router_force_biased=0.1), "decode.experts", "moe_router_force_biased"),
        (TP2, "decode.moe_without_host_sync", "tensor parallelism splits the weights"),
        (megatron(moe_router_num_groups=2, moe_router_group_topk=1), "decode.router", "routing by groups"),
        (megatron(moe_router_num_groups=2, moe_router_group_topk=1), "decode.norm_in_router", "routing by groups"),
        (megatron(moe_router_score_function="sqrtsoftplus"), "decode.router", "score_function=sqrtsoftplus"),
        ({"model": {"num_moe_experts": 513}}, "decode.router", "more than 512 experts"),
        ({"model": {"moe_router_topk": 17, "num_moe_experts": 32}}, "decode.router", "more than 16 experts per token"),
        ({"model": {"vocab_size": 32768}}, "decode.draft_argmax", "over the GPU"),
        (megatron(fp32_residual_connection=True), "decode.gemm", "fp32_residual_connection"),
        (megatron(fp8_param=True), "decode.gemm", "weights are stored in FP8"),
        # a training step as one CUDA graph
        (PP2, "training_step", "pipeline parallelism"),
        (ALLTOALL, "training_step", "copies token counts to the host"),
        (ETP2, "training_step", "expert tensor parallelism"),
        (TP2, "training_step", "not measured yet"),
        (TP2 | megatron(hidden_dropout=0.1), "training_step", "switch RNG states"),
        (megatron(moe_expert_capacity_factor=1.0), "training_step", "capacity factor"),
        (megatron(moe_latent_size=64), "training_step", "moe_latent_size"),
        ({"parallel": {"moe_token_dispatcher_type": "flex"}}, "training_step", "flex"),
        (selective("moe_act") | megatron(moe_router_force_biased=0.1), "training_step", "activation checkpointing"),
        ({"parallel": {"overlap_grad_reduce": True}}, "training_step", "overlap_grad_reduce"),
        ({"data": {"mask_document_boundaries": True}}, "training_step", "mask_document_boundaries"),
        (selective("moe_act") | megatron(hidden_dropout=0.1), "training_step", "activation checkpointing"),
        (selective("moe") | FP8, "training_step", "activation checkpointing in FP8"),
        ({"training": {"sequence_length": 192}}, "training_step", "sequence_length=192"),
        ({"training": {"cuda_graph": False}}, "training_step", "training.cuda_graph=false"),
        # precision
        ({"precision": {"compute": "fp32"}}, "norm", "precision.compute=fp32"),
        ({"precision": {"compute": "fp32"}}, "decode.gemm", "precision.compute=fp32"),
    ],
)
def test_a_setting_that_prevents_the_fast_path(sections: dict[str, Any], path: str, reason: str) -> None:
    assert decision(plan_of(), path), "the table's row proves nothing: the path is slow without the setting"
    found = decision(
        plan_of(**{**({} if "data" not in sections else {"training": {"micro_batch_size": 1}}), **sections}), path
    )
    assert not found
    assert reason in (found.reason or "")


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        (ALLTOALL, "moe_token_dispatcher_type=alltoall"),
        ({"parallel": EP2["parallel"] | {"moe_token_dispatcher_type": "allgather"}, **TWICE}, "allgather"),
        ({"parallel": EP2["parallel"] | {"gpus_per_node": 1}, **TWICE}, "not in one node"),
        (EP2 | megatron(moe_latent_size=64), "moe_latent_size"),
        (EP2 | megatron(moe_shared_expert_overlap=True), "overlaps with communication"),
        (EP2 | {"data": {"mask_document_boundaries": True}, "training": {"micro_batch_size": 1}}, "shapes differ"),
    ],
)
def test_what_keeps_expert_parallel_ranks_from_our_exchange(sections: dict[str, Any], reason: str) -> None:
    plan = plan_of(**EP2)
    assert plan.moe.expert_exchange
    assert plan.moe.symmetric_memory
    assert plan.training_step
    found = plan_of(**sections)
    assert reason in (found.moe.expert_exchange.reason or "")
    assert not found.moe.symmetric_memory
    assert not found.training_step


CP2 = {"parallel": {"world_size": 2, "context_parallel_size": 2}}


@pytest.mark.parametrize("sections", [TP2, CP2])
def test_collectives_are_captured_where_it_is_requested(sections: dict[str, Any]) -> None:
    assert not plan_of(**sections).training_step
    requested = {"training": {"cuda_graph": True, "sequence_length": 512}}
    assert plan_of(**sections, **requested).training_step


def test_attention_between_context_parallel_ranks_runs_on_shorter_chunks() -> None:
    requested = {"training": {"cuda_graph": True, "sequence_length": 384}}
    with pytest.raises(UserError, match="not a multiple of 512"):
        plan_of(**CP2, **requested)


def test_activation_checkpointing_is_captured() -> None:
    assert plan_of(**selective("moe")).training_step


def test_ranks_on_two_nodes_share_no_memory() -> None:
    there = Hardware("cuda", "transformer_engine", KernelStatus(frozenset(Kernel)), ranks_per_node=1)
    plan = plan_of(there, **EP2)
    assert plan.moe.expert_exchange
    assert plan.moe.symmetric_memory.reason == "2 expert-parallel ranks, and 1 ranks on this node"
    assert not plan.training_step


def test_ranks_without_shared_memory_exchange_by_collectives() -> None:
    plan = plan_of(CPU, **EP2)
    assert plan.moe.expert_exchange
    assert plan.moe.symmetric_memory.path == "all-gather and reduce-scatter"
    assert plan.moe.symmetric_memory.reason == "no GPU"


KERNEL_DECIDES = {
    Kernel.GATED_DELTA_RULE: ("gated_delta_net.delta_rule", "training_step"),
    Kernel.GATED_DELTA_MIXER: ("gated_delta_net.fused_mixer",),
    Kernel.QKV_NORM_ROPE: ("gated_attention.fused_qkv",),
    Kernel.RESIDUAL_NORM: ("norm",),
    Kernel.PERMUTATION: ("moe.permutation", "moe.fused_residual", "decode.moe_without_host_sync", "training_step"),
    Kernel.EXPERT_EXCHANGE: ("moe.symmetric_memory", "training_step"),
    Kernel.GROUPED_GEMM: ("moe.grouped_gemm", "decode.moe_without_host_sync", "training_step"),
    Kernel.SWIGLU: ("moe.swiglu", "moe.shared_expert_swiglu"),
    Kernel.SHARED_EXPERT_GATE: ("moe.shared_expert_gate", "moe.fused_residual"),
    Kernel.FP8_EXPERTS: ("moe.fp8_experts",),
    Kernel.DECODE_GEMM: ("decode.gemm", "decode.norm_in_router"),
    Kernel.DECODE_ATTENTION: ("decode.attention",),
    Kernel.DECODE_ROUTER: ("decode.router", "decode.norm_in_router"),
    Kernel.DECODE_EXPERTS: ("decode.experts_kernel",),
    Kernel.DECODE_ARGMAX: ("decode.argmax", "decode.draft_argmax"),
    Kernel.DECODE_GATED_DELTA: ("decode.gated_delta",),
}


@pytest.mark.parametrize("kernel", Kernel)
def test_a_kernel_that_fails_its_check_changes_exactly_its_decisions(kernel: Kernel) -> None:
    fp8 = {**FP8, "training": {"micro_batch_size": 2}}
    if kernel is Kernel.EXPERT_EXCHANGE:
        fp8 |= EP2
    failed = KernelStatus(frozenset(set(Kernel) - {kernel}), {kernel: "FAILED its check"})
    config = validate(fp8)
    good = execution_plan(config, GPU)
    bad = execution_plan(config, Hardware("cuda", "transformer_engine", failed))
    changed = {(kind, part) for kind, part, found in good.rows() if found} - {
        (kind, part) for kind, part, found in bad.rows() if found
    }
    assert len(changed) == len(KERNEL_DECIDES[kernel])
    for path in KERNEL_DECIDES[kernel]:
        assert decision(good, path)
        assert not decision(bad, path)
        assert "FAILED its check" in (decision(bad, path).reason or "")


def test_the_torch_backend_has_torch_attention() -> None:
    core = plan_of(Hardware("cuda", "torch", GPU.kernels)).gated_attention.core
    assert (core.is_fast, core.reason) == (False, "model.backend is torch")


def test_fp8_experts_replace_bf16_ones() -> None:
    assert plan_of(precision={"compute": "bf16", "fp8": "hybrid"}).moe.fp8_experts


@pytest.mark.parametrize(
    ("sections", "consumers"),
    [
        ({}, (2, 1, 4)),
        (selective("moe"), (2, 1, 1)),
        (selective("shared_experts"), (2, 1, 1)),
        (selective("layernorm"), (1, 1, 1)),
    ],
)
def test_consumers_of_the_norms(sections: dict[str, Any], consumers: tuple[int, int, int]) -> None:
    plan = plan_of(**sections)
    found = (plan.gated_delta_net, plan.gated_attention, plan.moe)
    assert tuple(each.sublayer.num_norm_consumers for each in found) == consumers


def test_copied_weights_bound_the_number_of_tokens() -> None:
    tiny = plan_of().decode.experts_max_tokens
    assert tiny == 16
    wide = {"hidden_size": 4096, "moe_ffn_hidden_size": 2048, "moe_router_topk": 8, "num_moe_experts": 16}
    # 3 · 4096 · 2048 · 2 bytes per expert are 48 MiB: not even one token's eight experts stay below 64 MiB
    assert plan_of(model=wide).decode.experts_max_tokens == 0


def test_a_plan_says_why_and_is_shared_by_copies() -> None:
    plan = plan_of(**EP2)
    assert copy.deepcopy(plan) is plan
    dispatcher = "dispatcher between expert-parallel ranks (experts are spread over ranks)"
    assert plan.as_tree()["moe"]["local dispatcher"] == dispatcher
    moe = next(line for line in plan.lines() if line.startswith("moe: "))
    permutation = "torch reference (megatron-core's dispatcher permutes the tokens)"
    assert f"local dispatcher: {dispatcher};" in moe
    assert f"permutation: {permutation};" in moe
    assert plan.as_tree()["decode"]["argmax"] == "decode argmax"


def test_a_dry_run_assumes_a_gpu_with_every_kernel() -> None:
    assert assumed_hardware(config_of()) == GPU
    assert assumed_hardware(validate({})).backend == "torch"
