"""Names and types of megatron-core's TransformerConfig fields, parsed from the installed wheel's source with `ast`.

Importing megatron-core takes about eight seconds; a misspelt option must be refused in under two. The pass-through
`model.megatron.<field>=…` is therefore checked against the source text of the installed wheel.
"""

import ast
import importlib.util
import math
from functools import cache
from pathlib import Path

from megatron_q3n.config.errors import UserError, suggest

_SOURCES = (
    ("core/model_parallel_config.py", "ModelParallelConfig"),
    ("core/transformer/transformer_config.py", "TransformerConfig"),
)

# fields with a typed setting here: setting them through model.megatron could contradict it
TYPED_SETTINGS = {
    "num_layers": "model.num_layers",
    "hidden_size": "model.hidden_size",
    "num_attention_heads": "model.num_attention_heads",
    "num_query_groups": "model.num_query_groups",
    "kv_channels": "model.kv_channels",
    "linear_conv_kernel_dim": "model.linear_conv_kernel_dim",
    "linear_key_head_dim": "model.linear_key_head_dim",
    "linear_value_head_dim": "model.linear_value_head_dim",
    "linear_num_key_heads": "model.linear_num_key_heads",
    "linear_num_value_heads": "model.linear_num_value_heads",
    "num_moe_experts": "model.num_moe_experts",
    "moe_router_topk": "model.moe_router_topk",
    "moe_ffn_hidden_size": "model.moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "model.moe_shared_expert_intermediate_size",
    "moe_router_load_balancing_type": "model.moe_router_load_balancing_type",
    "moe_aux_loss_coeff": "model.moe_aux_loss_coeff",
    "moe_z_loss_coeff": "model.moe_z_loss_coeff",
    "mtp_num_layers": "model.mtp_num_layers",
    "mtp_loss_scaling_factor": "model.mtp_loss_scaling_factor",
    "mtp_use_repeated_layer": "model.mtp_use_repeated_layer",
    "init_method_std": "model.init_method_std",
    "embedding_init_method_std": "model.embedding_init_method_std",
    "layernorm_epsilon": "model.layernorm_epsilon",
    "tensor_model_parallel_size": "parallel.tensor_model_parallel_size",
    "pipeline_model_parallel_size": "parallel.pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline_model_parallel_size",
    "context_parallel_size": "parallel.context_parallel_size",
    "expert_model_parallel_size": "parallel.expert_model_parallel_size",
    "expert_tensor_parallel_size": "parallel.expert_tensor_parallel_size",
    "sequence_parallel": "parallel.sequence_parallel",
    "batch_p2p_comm": "parallel (batched point-to-point is wrong for interleaved stages)",
    "overlap_p2p_comm": "parallel (batched point-to-point is wrong for interleaved stages)",
    "moe_token_dispatcher_type": "parallel.moe_token_dispatcher_type",
    "bf16": "precision.compute",
    "fp16": "precision.compute",
    "params_dtype": "precision.compute",
    "pipeline_dtype": "precision.compute",
    "fp8": "precision.fp8",
    "fp8_recipe": "precision.fp8_recipe",
    "recompute_granularity": "training.recompute_granularity",
    "recompute_modules": "training.recompute_modules",
    "recompute_method": "training.recompute_method",
    "recompute_num_layers": "training.recompute_num_layers",
    "experimental_attention_variant": "model.mixer_pattern",
    "normalization": "model (RMSNorm is the architecture)",
    "layernorm_zero_centered_gamma": "model (zero-centered norms are the architecture)",
    "attention_output_gate": "model.attention_gate",
    "window_size": "model.attention_window_tokens",
    "window_attn_skip_freq": "model.mixer_pattern (S is attention with a window)",
    "moe_router_enable_expert_bias": "model.moe_router_enable_expert_bias",
    "moe_router_bias_update_rate": "model.moe_router_bias_update_rate",
    "calculate_per_token_loss": "training (losses are means over the global batch's tokens)",
    "moe_grouped_gemm": "model (experts are stacked)",
    "moe_router_dtype": "model (the router computes in fp32)",
    "transformer_impl": "model.backend",
    "deterministic_mode": "training.deterministic",
    "timers": "logging",
}

# fields whose other values cannot work here, with the value that they have and the reason
FIXED: dict[str, tuple[object, str]] = {
    "attention_dropout": (0.0, "attention runs without dropout, in packed rows and in decoding"),
    "add_bias_linear": (False, "projections and experts of this architecture have no bias"),
    "add_qkv_bias": (False, "projections of this architecture have no bias"),
    "gated_linear_unit": (True, "the experts are SwiGLU"),
    "qk_layernorm": (True, "queries and keys are normalized in this architecture"),
    "moe_shared_expert_gate": (True, "the shared expert of this architecture is gated"),
    "is_hybrid_model": (True, "the model is a hybrid of Gated DeltaNet and attention"),
    "variable_seq_lengths": (False, "every row of a batch is equally long"),
    "multi_latent_attention": (False, "attention is grouped-query attention"),
}


@cache
def megatron_root() -> Path:
    """Return the folder of the installed `megatron` namespace package, without importing megatron-core."""
    spec = importlib.util.find_spec("megatron")
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / "core").is_dir():
            return Path(location)
    raise UserError("megatron-core is not installed. Run tools/quickstart, or: pip install -r requirements.txt")


@cache
def transformer_config_fields() -> dict[str, str]:
    """Return {field name: annotation source} of TransformerConfig and its parent."""
    fields: dict[str, str] = {}
    for relative, class_name in _SOURCES:
        tree = ast.parse((megatron_root() / relative).read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        fields[item.target.id] = ast.unparse(item.annotation)
    assert fields, "found no TransformerConfig fields: megatron-core moved its source"
    return fields


def check_pass_through(options: dict[str, object]) -> None:
    """Check the names and types of `model.megatron.*`.

    Raises: UserError for an unknown field (with a suggestion), a field with a typed setting here, a field that takes a
        function, or a value whose type contradicts the field's annotation.
    """
    known = transformer_config_fields()
    for name, value in options.items():
        setting = f"model.megatron.{name}"
        if name not in known:
            raise UserError(
                f"{setting}: megatron-core's TransformerConfig has no such field.{suggest(name, known)} "
                f"The fields are those of {megatron_root()}/{_SOURCES[1][0]}."
            )
        if name in TYPED_SETTINGS:
            raise UserError(
                f"{setting}: set {TYPED_SETTINGS[name]} instead; the pass-through is for options without one."
            )
        if name in FIXED and value != FIXED[name][0]:
            raise UserError(
                f"{setting}={value!r}: {FIXED[name][1]}; it is always {FIXED[name][0]!r} here. Leave it out."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{setting}={value!r} is no number. Give a finite one.")
        annotation = known[name]
        if "Callable" in annotation:
            raise UserError(f"{setting} takes a Python function ({annotation}) and cannot be set from a configuration.")
        if not _fits(value, annotation):
            raise UserError(f"{setting}={value!r}: megatron-core declares this field as {annotation}.")


def _fits(value: object, annotation: str) -> bool:
    """Return whether a value can have the annotated type; True for unknown annotations (megatron-core checks them)."""
    if value is None:
        return "Optional" in annotation or "None" in annotation
    checks = {"bool": bool, "int": int, "float": (int, float), "str": str, "List": list, "list": list, "Literal": str}
    words = {w for w in checks if w in annotation}
    if not words or "Enum" in annotation or "Any" in annotation or "Dict" in annotation:
        return True
    if isinstance(value, bool):
        return "bool" in words
    return any(isinstance(value, checks[w]) for w in words if w != "bool")  # type: ignore[arg-type]
