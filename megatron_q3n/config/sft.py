"""Supervised fine-tuning settings: conversations, chat template, packing, and the tokens in the loss."""

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_q3n.config.errors import UserError, suggest
from megatron_q3n.config.paths import DataPath, TemplatePath
from megatron_q3n.config.section import MAX_SEED, Section

# columns of the three shapes of a conversation (data/conversation_shapes.py)
CONVERSATION_COLUMNS = ("messages", "conversations", "instruction", "input", "output", "history", "system", "tools")


class TaskSet(Section):
    """Questions of a reasoning-gym task. Two sets with disjoint ranges [first, last) have no text in common.

    The hash of a question's text is a number in [0, 1), whatever the seed; a set holds the questions whose hash is in
    its range.
    """

    name: str = Field(description="a reasoning-gym task set, e.g. chain_sum")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="the task set's own settings, e.g. {max_terms: 2}"
    )
    size: int = Field(1000, gt=0, description="questions")
    seed: int = Field(1, ge=0, le=MAX_SEED)
    first: float = Field(0.0, ge=0, lt=1, description="begin of its range of text hashes")
    last: float = Field(1.0, gt=0, le=1, description="end of its range of text hashes")
    distinct: bool = Field(False, description="no text appears twice")

    @model_validator(mode="after")
    def _legal(self) -> "TaskSet":
        if self.first >= self.last:
            raise UserError(f"task set {self.name}: first={self.first} must be below last={self.last}.")
        return self


class ConversationSource(Section):
    """Conversations from a file or folder, or generated from a task set's questions and answers."""

    path: DataPath | None = Field(
        None,
        description="a file (.jsonl, .json, .parquet, .gz, .zst), a folder of them, a folder saved by Hugging Face "
        "datasets, or a glob pattern; rows of {messages}, ShareGPT or Alpaca shape (docs/conversations.md)",
    )
    task: TaskSet | None = None
    columns: dict[str, str] = Field(
        default_factory=dict, description="the file's columns by our names, e.g. {instruction: question, output: reply}"
    )
    weight: float = Field(
        1.0, gt=0, le=100, description="how often each conversation occurs in one pass; 0.5: half of them"
    )

    @model_validator(mode="after")
    def _legal(self) -> "ConversationSource":
        if (self.path is None) == (self.task is None):
            raise UserError("sft.train: a source is either {path: …} or {task: {name: …}}, not both or neither.")
        if self.task is not None and self.columns:
            raise UserError(f"sft.train: columns={self.columns} has no effect with a task set; remove it.")
        unknown = next((name for name in self.columns if name not in CONVERSATION_COLUMNS), None)
        if unknown is not None:
            raise UserError(
                f"sft.train: columns has {unknown!r}.{suggest(unknown, CONVERSATION_COLUMNS)} It maps our names to the "
                f"file's; ours are {', '.join(CONVERSATION_COLUMNS)}."
            )
        return self


class SftConfig(Section):
    """Conversations and how they are tokenized and packed."""

    train: list[ConversationSource] = Field(default_factory=list)
    validation: list[ConversationSource] = Field(
        default_factory=list, description="empty: a share of the training conversations, selected by text hash"
    )
    validation_percent: float = Field(5.0, gt=0, lt=50, description="that share, if sft.validation is empty")
    chat_template: TemplatePath | None = Field(
        None,
        description="a Jinja file, or the template itself if it contains {{; null: the tokenizer's own, else ChatML if "
        "it has those tokens, else a plain one",
    )
    tokenizer_vocab_size: int | None = Field(
        None,
        gt=256,
        description="train a small tokenizer on the training conversations, for models trained from scratch",
    )
    turns: Literal["all", "last"] = Field(
        "all", description="assistant turns in the loss: all, or the last of each conversation"
    )
    alignment: int = Field(
        1,
        gt=0,
        description="packed conversations are padded to a multiple of this; context parallelism needs 2 × its size",
    )
    too_long: Literal["drop", "oldest_turns", "cut"] = Field(
        "drop",
        description="a conversation longer than training.sequence_length is dropped, loses its oldest exchanges "
        "(the system message stays), or is truncated",
    )

    @model_validator(mode="after")
    def _legal(self) -> "SftConfig":
        weighted = next((source for source in self.validation if source.weight != 1), None)
        if weighted is not None:
            raise UserError(
                f"sft.validation: weight={weighted.weight} has no effect; each conversation is validated on once. "
                "Remove it."
            )
        return self
