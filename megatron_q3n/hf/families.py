"""The model families whose checkpoints we read and write, and how their published tensors differ.

All are the same architecture. Qwen3.5's MoE models differ in form: DeltaNet projections are apart
and flat, not key head by key head; the trunk's experts are one stacked tensor per layer, those of
multi-token prediction one by one. They are published as multimodal models, whose text part is ours
and has a prefix of its own; a text-only model of the same kind has Qwen3-Next's.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Family:
    """Where and in what pieces a family publishes its weights."""

    model_type: str  # in config.json; also what transformers calls it
    architecture: str  # the class that transformers, vLLM and SGLang look up
    prefix: str = "model."  # of all but the head and multi-token prediction
    flat_projections: bool = False  # in_proj_{qkv,z,b,a} instead of in_proj_{qkvz,ba}
    # the trunk's experts, in one tensor each for gate and up, and down
    stacked_experts: bool = False
    multimodal: bool = False  # the text part of a larger model: config.json has a text_config
    float32: tuple[str, ...] = ()  # names (their ends) published in fp32 beside bf16


QWEN3_NEXT = Family("qwen3_next", "Qwen3NextForCausalLM")
QWEN3_5_MOE_TEXT = Family(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    flat_projections=True,
    stacked_experts=True,
    float32=("linear_attn.A_log", "linear_attn.norm.weight"),
)
QWEN3_5_MOE = replace(
    QWEN3_5_MOE_TEXT,
    model_type="qwen3_5_moe",
    architecture="Qwen3_5MoeForConditionalGeneration",
    prefix="model.language_model.",
    multimodal=True,
)
FAMILIES = (QWEN3_NEXT, QWEN3_5_MOE_TEXT, QWEN3_5_MOE)
