"""Model families with a Hugging Face format, and the differences between their tensors.

All have the same architecture. Qwen3.5's MoE models differ in format: DeltaNet projections are separate and flat, not
grouped by key head; the trunk's experts are one stacked tensor per layer, those of multi-token prediction are separate.
They are published as multimodal models, whose text part is our model, under a longer prefix; a text-only model of the
same kind has Qwen3-Next's prefix.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Family:
    """Format of a model family's published weights.

    model_type: the field of config.json. architecture: the class name that transformers, vLLM and SGLang look up.
    prefix: of all parameters but those of the head and multi-token prediction. flat_projections: in_proj_{qkv,z,b,a}
    instead of in_proj_{qkvz,ba}. stacked_experts: one tensor for gate and up, and one for down, of all experts of a
    trunk layer. multimodal: the text part of a larger model, config.json has a text_config. float32: suffixes of
    parameters that are published in fp32 while the others are in bf16. tied_embeddings: of one model folder, the head
    is the embedding, and lm_head.weight is absent or ignored.
    """

    model_type: str
    architecture: str
    prefix: str = "model."
    flat_projections: bool = False
    stacked_experts: bool = False
    multimodal: bool = False
    float32: tuple[str, ...] = ()
    tied_embeddings: bool = False


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
