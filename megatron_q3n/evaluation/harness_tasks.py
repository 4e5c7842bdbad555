"""Tasks of lm-evaluation-harness, from local files, on a model in memory."""

import importlib
import os
from typing import Any

from megatron_q3n.config import UserError
from megatron_q3n.config.evaluate import EvaluateConfig
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.parallel import Parallel


def run_tasks(model: Any, tokenizer: TextTokenizer, wanted: EvaluateConfig, group: Parallel) -> dict[str, Any]:
    """Run the harness over local tasks. A collective call.

    Returns: each task's numbers, on the leader.

    Raises: UserError for a task that the folder does not have.
    """
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # tasks' data are local files; nothing is asked of a hub
    # late: optional, and seconds to import
    lm_eval, tasks = (importlib.import_module(name) for name in ("lm_eval", "lm_eval.tasks"))
    harness = importlib.import_module("megatron_q3n.evaluation.harness")
    manager = tasks.TaskManager(include_path=wanted.tasks_dir, include_defaults=False)
    missing = [task for task in wanted.tasks if task not in manager.all_tasks]
    if missing:
        raise UserError(
            f"evaluate.tasks: {wanted.tasks_dir} has no task {missing[0]}; it has "
            f"{', '.join(sorted(manager.all_tasks)) or 'none'}."
        )
    adapter = harness.HarnessModel(
        model,
        tokenizer,
        group.groups.dp,
        tokens_per_pass=wanted.batch_rows * wanted.context_tokens,
        draft_depth=wanted.draft_depth,
    )
    found = lm_eval.simple_evaluate(
        adapter,
        tasks=list(wanted.tasks),
        task_manager=manager,
        limit=wanted.task_limit,
        num_fewshot=wanted.num_fewshot,
        log_samples=False,
        bootstrap_iters=0,
    )
    if found is None:  # the harness gives its results to one process of a machine
        return {}
    return {task: _numbers(scores) for task, scores in found["results"].items()}


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """Keep a task's numbers; the harness names them "acc,none"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in scores.items()
        if isinstance(value, int | float) and not name.startswith("sample")
    }
