"""lm-evaluation-harness runs: tasks from local files, on a model in memory."""

import importlib
import os
from typing import Any

from megatron_q3n.config import UserError
from megatron_q3n.config.evaluate import EvaluateConfig
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.model.decode.protocols import DecodeModel
from megatron_q3n.parallel import Parallel


def run_tasks(
    model: DecodeModel, tokenizer: TextTokenizer, stop_tokens: frozenset[int], settings: EvaluateConfig, group: Parallel
) -> dict[str, Any]:
    """Run lm-evaluation-harness on the configured tasks; `stop_tokens` end a completion. A collective call.

    Returns: the metrics of each task, on the leader; empty on other ranks.

    Raises: UserError for a task that is not in `evaluate.tasks_dir`.
    """
    # task data are local files; without this the datasets library contacts the Hugging Face hub
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    # imported here: the package is optional and takes seconds to import
    lm_eval, tasks = (importlib.import_module(name) for name in ("lm_eval", "lm_eval.tasks"))
    harness = importlib.import_module("megatron_q3n.evaluation.harness_adapter")
    manager = tasks.TaskManager(include_path=settings.tasks_dir, include_defaults=False)
    missing = [task for task in settings.tasks if task not in manager.all_tasks]
    if missing:
        raise UserError(
            f"evaluate.tasks: {settings.tasks_dir} has no task {missing[0]}; it has "
            f"{', '.join(sorted(manager.all_tasks)) or 'none'}."
        )
    adapter = harness.HarnessModel(
        model,
        tokenizer,
        group.groups.dp,
        tokens_per_pass=settings.batch_size * settings.context_tokens,
        draft_depth=settings.draft_depth,
        stop_tokens=stop_tokens,
    )
    output = lm_eval.simple_evaluate(
        adapter,
        tasks=list(settings.tasks),
        task_manager=manager,
        limit=settings.task_limit,
        num_fewshot=settings.num_fewshot,
        log_samples=False,
        bootstrap_iters=0,
    )
    # the harness returns its results in one process per machine
    if output is None:
        return {}
    return {task: _numbers(scores) for task, scores in output["results"].items()}


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """Return the numeric metrics of a task; the harness appends the filter name, as in "acc,none"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in scores.items()
        if isinstance(value, int | float) and not name.startswith("sample")
    }
