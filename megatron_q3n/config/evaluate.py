"""What the evaluate stage measures: held-out text, drafts, recall, and tasks of lm-evaluation-harness."""

from typing import TYPE_CHECKING

from pydantic import Field

from megatron_q3n.config.errors import UserError
from megatron_q3n.config.section import Section

if TYPE_CHECKING:
    from megatron_q3n.config.run import RunConfig  # it imports this file


class TextSet(Section):
    """Held-out text with a name: a prepared folder."""

    name: str = Field(min_length=1, description="what the results call it")
    path: str = Field(description="a folder written by tools/prepare_data.py with the model's tokenizer")


class EvaluateConfig(Section):
    """Data sets, how much of each, recall, and tasks."""

    sets: list[TextSet] = Field(default_factory=list, description="empty: the validation text of `data`")
    rows: int = Field(64, ge=0, description="rows of each set; 0 measures no text")
    context_tokens: int = Field(512, gt=1, description="tokens of a row")
    batch_rows: int = Field(8, gt=0, description="rows in one pass, on each replica")
    position_buckets: int = Field(8, gt=0, description="equal stretches of a row that are reported apart")
    draft_depth: int = Field(0, ge=0, description="drafts to judge at each place; 0 judges none")
    draft_stride: int = Field(32, gt=0, description="tokens between places where drafts are judged")
    recall_lengths: list[int] = Field(
        default_factory=list,
        description="zero-shot recall: so many random tokens of each set, then the same again, e.g. [16,64,256,1024]; "
        "loss and accuracy on the second copy (evaluation/recall.py)",
    )
    recall_rows: int = Field(64, gt=0, description="rows for each of recall_lengths")
    tasks: list[str] = Field(
        default_factory=list, description="tasks of lm-evaluation-harness, by the names in tasks_dir's files"
    )
    tasks_dir: str | None = Field(None, description="folder of task files (.yaml), whose data are local files too")
    task_limit: int | None = Field(None, gt=0, description="documents of each task; null: all")
    num_fewshot: int | None = Field(None, ge=0, description="examples before each; null: the task's own")
    seed: int = Field(1, ge=0, description="of drawn drafts and of recall's tokens")
    tokenizer: str | None = Field(
        None, description="a tokenizer.json or its folder; null: the one the model was trained with"
    )
    output: str | None = Field(
        None,
        description="a file for the results, JSON; null: evaluation.json in the checkpoint's run directory, whose "
        "report then shows them",
    )


def check_evaluate(config: "RunConfig") -> None:
    """Refuse what evaluation cannot do.

    Raises: UserError.
    """
    wanted, layout = config.evaluate, config.parallel
    if config.checkpoint.load is None:
        raise UserError(
            "stage=evaluate needs a trained model: say which with checkpoint.load=RUN_DIR "
            "(or a checkpoint in one, e.g. checkpoint.load=runs/latest)."
        )
    for name in ("pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(layout, name) > 1:
            raise UserError(
                f"parallel.{name}={getattr(layout, name)}: evaluation spreads a model by tensor and expert parallelism "
                "only; set it to 1 (a checkpoint loads in any layout)."
            )
    if not (wanted.rows or wanted.tasks or wanted.recall_lengths):
        raise UserError("evaluate.rows=0, no evaluate.tasks and no evaluate.recall_lengths leave nothing to measure.")
    if any(length < 2 for length in wanted.recall_lengths):
        raise UserError(
            f"evaluate.recall_lengths={wanted.recall_lengths}: the first token of a copy cannot be recalled and is not "
            "counted, so each length must be at least 2."
        )
    if wanted.tasks and wanted.tasks_dir is None:
        raise UserError(
            f"evaluate.tasks={wanted.tasks} needs evaluate.tasks_dir, the folder with their .yaml files; tasks are "
            "read from local files only."
        )
    if wanted.context_tokens % wanted.position_buckets:
        raise UserError(
            f"evaluate.context_tokens={wanted.context_tokens} is not divisible by evaluate.position_buckets="
            f"{wanted.position_buckets}; make it a multiple."
        )
    shared = layout.tensor_model_parallel_size
    if wanted.context_tokens % shared:
        raise UserError(
            f"evaluate.context_tokens={wanted.context_tokens} is not divisible by "
            f"parallel.tensor_model_parallel_size={shared}; make it a multiple."
        )
    if wanted.draft_depth and wanted.draft_stride >= wanted.context_tokens:
        raise UserError(
            f"evaluate.draft_stride={wanted.draft_stride} must be below evaluate.context_tokens="
            f"{wanted.context_tokens}, or no place is judged."
        )
