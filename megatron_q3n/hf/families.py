"""The model families whose checkpoints we read and write, and how their published tensors differ.

Both are the same architecture. Qwen3.5's MoE models publish a multimodal model, whose text part is
ours, under another prefix; its DeltaNet projections are apart and flat, not key head by key head;
the trunk's experts are one stacked tensor per layer, those of multi-token prediction one by one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Where and in what pieces a family publishes its weights."""

    model_type: str  # in config.json; also what transformers calls it
    architecture: str  # the class that transformers, vLLM and SGLang look up
    prefix: str = "model."  # of all but the head and multi-token prediction
    flat_projections: bool = False  # in_proj_{qkv,z,b,a} instead of in_proj_{qkvz,ba}
    stacked_experts: bool = (
        False  # the trunk's experts, in one tensor each for gate and up, and down
    )
    float32: tuple[str, ...] = ()  # names (their ends) published in fp32 beside bf16


QWEN3_NEXT = Family("qwen3_next", "Qwen3NextForCausalLM")
QWEN3_5_MOE = Family(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    prefix="model.language_model.",
    flat_projections=True,
    stacked_experts=True,
    float32=("linear_attn.A_log", "linear_attn.norm.weight"),
)
FAMILIES = (QWEN3_NEXT, QWEN3_5_MOE)
