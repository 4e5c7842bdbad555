"""What the generate stage is asked for."""

from pydantic import Field, field_validator

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.section import Section


class InferenceConfig(Section):
    """Prompts, how tokens are drawn, and how the work is cut."""

    prompts: list[str] = Field(default_factory=list, description="texts to continue")
    max_new_tokens: int = Field(256, gt=0)
    temperature: float = Field(0.7, ge=0, description="0 is greedy")
    top_k: int | None = Field(None, gt=0, description="draw from so many likeliest tokens only")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the smallest set of tokens with this much mass")
    stop: list[str | int] = Field(
        default_factory=list,
        description="tokens that end a text, by id or by the text they stand for, beside the end of a document",
    )
    seed: int = Field(1, ge=0)
    draft_depth: int = Field(
        0, ge=0, description="tokens drafted by the MTP layer and verified together; 0 drafts none"
    )
    prefill_tokens: int = Field(4096, gt=0, description="most tokens of prompts that one pass reads; bounds its memory")
    max_sequences: int | None = Field(None, gt=0, description="most sequences at once, others wait; null: all")
    cuda_graph: bool | None = Field(
        None,
        description="launch a whole decoding step as one CUDA graph; null: on a GPU, where nothing stands against it",
    )
    tokenizer: str | None = Field(
        None, description="a tokenizer.json or its folder; null: the one the model was trained with"
    )
    output: str | None = Field(None, description="a file for the results, one JSON object a line")

    @field_validator("prompts")
    @classmethod
    def _not_empty(cls, prompts: list[str]) -> list[str]:
        for number, prompt in enumerate(prompts, 1):
            if not prompt:
                raise UserError(f"inference.prompts: prompt {number} is empty; give it some text to continue.")
        return prompts
