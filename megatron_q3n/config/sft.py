"""Supervised fine-tuning: which conversations, how they are spelled, and what counts."""

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.section import Section


class TaskSet(Section):
    """Questions of a reasoning-gym task. Two sets over disjoint shares of the texts have no text in common.

    A question belongs to the place in [0, 1) that the hash of its text says, whatever seed it came from; a
    set holds the questions of its share of that interval.
    """

    name: str = Field(description="a reasoning-gym task set, e.g. chain_sum")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="the task set's own settings, e.g. {max_terms: 2}"
    )
    size: int = Field(1000, gt=0, description="questions")
    seed: int = Field(1, ge=0)
    first: float = Field(0.0, ge=0, lt=1, description="where its share of the texts begins")
    last: float = Field(1.0, gt=0, le=1, description="where its share of the texts ends")
    distinct: bool = Field(False, description="no text twice")

    @model_validator(mode="after")
    def _legal(self) -> "TaskSet":
        if self.first >= self.last:
            raise UserError(f"task set {self.name}: first={self.first} must be below last={self.last}.")
        return self


class ConversationSource(Section):
    """Conversations from a file or folder, or made of a task set's questions and answers."""

    path: str | None = Field(
        None, description="a .jsonl file of {messages: […]} objects, or a folder saved by Hugging Face datasets"
    )
    task: TaskSet | None = None

    @model_validator(mode="after")
    def _legal(self) -> "ConversationSource":
        if (self.path is None) == (self.task is None):
            raise UserError("a source of conversations is either {path: …} or {task: {name: …}}.")
        return self


class SftConfig(Section):
    """Conversations and the rules by which they become rows."""

    train: list[ConversationSource] = Field(default_factory=list)
    validation: list[ConversationSource] = Field(
        default_factory=list, description="none: a share of the training conversations, by text"
    )
    validation_percent: float = Field(5.0, gt=0, lt=50, description="that share, where no validation is given")
    chat_template: str | None = Field(
        None,
        description="a Jinja file, or the template itself if it holds {{; null: the tokenizer's own, else ChatML where "
        "it has those tokens, else a plain one",
    )
    tokenizer_vocab_size: int | None = Field(
        None,
        gt=256,
        description="train a small tokenizer on the training conversations, for models that begin from nothing",
    )
    turns: Literal["all", "last"] = Field(
        "all", description="assistant turns that count: all of them, or a conversation's last"
    )
    alignment: int = Field(
        1, gt=0, description="conversations in a row are padded to a multiple; context parallelism needs 2 × its size"
    )
    too_long: Literal["drop", "oldest_turns", "cut"] = Field(
        "drop",
        description="a conversation longer than training.sequence_length is left out, loses its oldest exchanges "
        "(the system message stays), or is cut at the end",
    )
