"""Layouts of the tests on two GPUs: parallel settings, training settings and FP8 of each, and their model."""

from typing import Any

STEPS, ROWS, TOKENS, VOCABULARY = 8, 8, 256, 64
MODEL = {
    "hidden_size": 64,
    "vocab_size": VOCABULARY,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "moe_shared_expert_intermediate_size": 64,
}
MOE_RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe", "gated_delta_net"]}
GRAPH = {"cuda_graph": True}
EXPERT_PARALLEL = {"expert_model_parallel_size": 2}
# layout -> parallel settings, training settings, FP8
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "dp2": ({}, {}, None),
    "ep2": (EXPERT_PARALLEL, {}, None),
    "ep2 eager": (EXPERT_PARALLEL, {"cuda_graph": False}, None),
    "ep2 alltoall": (EXPERT_PARALLEL | {"moe_token_dispatcher_type": "alltoall"}, {}, None),
    "ep2 recompute": (EXPERT_PARALLEL, MOE_RECOMPUTE, None),
    "ep2 overflow": (EXPERT_PARALLEL, {}, None),
    "ep2 fp8": (EXPERT_PARALLEL, {}, "hybrid"),
    "ep2 alltoall fp8": (EXPERT_PARALLEL | {"moe_token_dispatcher_type": "alltoall"}, {}, "hybrid"),
    "dp2 fp8": ({}, {}, "hybrid"),
    "tp2": ({"tensor_model_parallel_size": 2}, GRAPH, None),
    "tp2 eager": ({"tensor_model_parallel_size": 2}, {}, None),
    "tp2 ep2": (EXPERT_PARALLEL | {"tensor_model_parallel_size": 2}, GRAPH, None),
    "cp2": ({"context_parallel_size": 2}, GRAPH, None),
    "cp2 passing": ({"context_parallel_size": 2, "linear_context_parallel": "state_passing"}, GRAPH, None),
    "cp2 ep2": (EXPERT_PARALLEL | {"context_parallel_size": 2}, GRAPH, None),
    "pp2": ({"pipeline_model_parallel_size": 2}, {}, None),
}
ALONE = {"one": LAYOUTS["dp2"], "one recompute": ({}, MOE_RECOMPUTE, None), "one fp8": ({}, {}, "hybrid")}
