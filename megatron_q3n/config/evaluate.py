"""Settings of the evaluate stage: held-out text, draft acceptance, recall, and tasks of lm-evaluation-harness."""

from pydantic import Field

from megatron_q3n.config.paths import FilePath, InputPath
from megatron_q3n.config.section import MAX_SEED, Section


class TextSet(Section):
    """A named data set of held-out text: one prepared folder."""

    name: str = Field(min_length=1, description="name in the results")
    path: InputPath = Field(description="a folder written by tools/prepare_data.py with the model's tokenizer")


class EvaluateConfig(Section):
    """Data sets, the amount of text read from each, recall, and tasks."""

    sets: list[TextSet] = Field(default_factory=list, description="empty: the validation text of `data`")
    num_sequences: int = Field(64, ge=0, description="sequences of each data set; 0 measures no text")
    context_tokens: int = Field(512, gt=1, description="tokens of a sequence")
    batch_size: int = Field(8, gt=0, description="sequences per forward pass, on each replica")
    position_buckets: int = Field(8, gt=0, description="equal ranges of positions, each with its own loss")
    draft_depth: int = Field(0, ge=0, description="draft tokens scored at each position; 0 scores none")
    draft_stride: int = Field(32, gt=0, description="tokens between positions at which drafts are scored")
    recall_lengths: list[int] = Field(
        default_factory=list,
        description="zero-shot recall: this many random tokens of each set, then the same tokens again, e.g. "
        "[16,64,256,1024]; loss and accuracy on the second copy (evaluation/copy_recall.py)",
    )
    num_recall_sequences: int = Field(64, gt=0, description="sequences for each of recall_lengths")
    tasks: list[str] = Field(
        default_factory=list, description="tasks of lm-evaluation-harness, by the names in tasks_dir's files"
    )
    tasks_dir: InputPath | None = Field(
        None, description="folder of task files (.yaml), whose data are local files too"
    )
    task_limit: int | None = Field(None, gt=0, description="documents of each task; null: all")
    num_fewshot: int | None = Field(None, ge=0, description="examples before each; null: the task's own")
    seed: int = Field(1, ge=0, le=MAX_SEED, description="seed of sampled drafts and of the tokens of recall")
    tokenizer: InputPath | None = Field(
        None, description="a tokenizer.json or its folder; null: the one the model was trained with"
    )
    output: FilePath | None = Field(
        None,
        description="a JSON file for the results; null: evaluation.json in the checkpoint's run directory, which the "
        "report includes. Earlier results in the file are kept, under `earlier`",
    )
