"""Settings of the training data: corpus, tokenizer, and the packing of documents into sequences."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.paths import DataPath, FilePath, InputPath
from megatron_q3n.config.section import Section


class BlendPart(Section):
    """A prepared data set and its weight in a blend."""

    path: DataPath = Field(description="a folder written by tools/prepare_data.py (it holds manifest.json)")
    weight: float = Field(1.0, gt=0, description="relative share of the sampled tokens")


class DataConfig(Section):
    """The corpus, its tokenizer, and the packing of documents into sequences."""

    source: Literal["stdlib", "blend"] = Field(
        "stdlib", description="stdlib: source code of the Python standard library, no download; blend: prepared folders"
    )
    cache_dir: FilePath | None = Field(
        None, description="prepared corpora and indices; null: $Q3N_CACHE, else ~/.cache/megatron_q3n"
    )
    stdlib_vocab_size: int = Field(512, gt=256, description="BPE entries trained on the standard library's train split")
    stdlib_validation_percent: float = Field(5.0, gt=0, lt=50, description="percentage of files that are held out")
    stdlib_packages: list[str] = Field(
        default_factory=list,
        description="installed packages whose source is added, e.g. [torch, transformers]; split by folder",
    )
    train: list[BlendPart] = Field(default_factory=list, description="blend used for training (source: blend)")
    validation: list[BlendPart] = Field(default_factory=list, description="blend used for validation")
    tokenizer: InputPath | None = Field(
        None, description="a tokenizer.json or its folder; null: the one in the manifest"
    )
    accept_changed_contents: bool = Field(
        False,
        description="with --resume: go on although text, tokenizer, conversations or prompts changed since the run "
        "began; for this one start, and recorded in the run's data.json",
    )
    mask_document_boundaries: bool = Field(
        False, description="attention and recurrent state are reset at each document (packed sequences, cu_seqlens)"
    )
    document_alignment: int = Field(
        1, gt=0, description="pad packed documents to a multiple; context parallelism needs 2 × its size"
    )
    num_workers: int = Field(0, ge=0, description="loader processes per rank; 0 loads in the training process")

    @model_validator(mode="after")
    def _legal(self) -> "DataConfig":
        if self.source == "blend" and not self.train:
            raise UserError(
                "data.source=blend needs data.train, a list of {path, weight}; "
                "create the folders with tools/prepare_data.py."
            )
        if self.source == "stdlib" and (self.train or self.validation):
            raise UserError("data.train and data.validation have no effect with data.source=stdlib; set source: blend.")
        if self.document_alignment > 1 and not self.mask_document_boundaries:
            raise UserError(
                f"data.document_alignment={self.document_alignment} has no effect without "
                "data.mask_document_boundaries=true."
            )
        return self
