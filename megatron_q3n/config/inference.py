"""Settings of text generation: section `inference`, for stage generate."""

from pydantic import Field, field_validator

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.paths import FilePath, InputPath
from megatron_q3n.config.sampling import Temperature
from megatron_q3n.config.section import MAX_SEED, Section


class InferenceConfig(Section):
    """Prompts, sampling parameters, and limits of the batch."""

    prompts: list[str] = Field(default_factory=list, description="texts to complete")
    max_new_tokens: int = Field(256, gt=0, description="most new tokens of each completion")
    temperature: Temperature = Field(0.7, description="sampling temperature, 0.001 to 1000; 0 is greedy")
    top_k: int | None = Field(None, gt=0, description="sample from the k most probable tokens only")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus sampling: sample from the smallest set of tokens with this probability mass",
    )
    stop: list[str | int] = Field(
        default_factory=list,
        description="stop tokens, by id or by text, in addition to the end of a document, and of a turn where the "
        "checkpoint has a chat template",
    )
    seed: int = Field(1, ge=0, le=MAX_SEED)
    draft_depth: int = Field(
        0, ge=0, description="speculative decoding: tokens drafted by the MTP layer and verified in one pass; 0: none"
    )
    prefill_tokens: int = Field(
        4096, gt=0, description="chunked prefill: most prompt tokens of one pass; bounds its memory"
    )
    max_sequences: int | None = Field(
        None, gt=0, description="most sequences in the running batch, others wait in the queue; null: all"
    )
    cuda_graph: bool | None = Field(
        None, description="replay each decode step as one CUDA graph; true: required; null: if possible; false: never"
    )
    tokenizer: InputPath | None = Field(
        None, description="a tokenizer.json or its folder; null: the tokenizer that the model was trained with"
    )
    output: FilePath | None = Field(None, description="JSON Lines file for the results")

    @field_validator("prompts")
    @classmethod
    def _not_empty(cls, prompts: list[str]) -> list[str]:
        for number, prompt in enumerate(prompts, 1):
            if not prompt:
                raise UserError(f"inference.prompts: prompt {number} is empty; give it text to complete.")
        return prompts
