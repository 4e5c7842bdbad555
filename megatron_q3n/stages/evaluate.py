"""What a checkpoint is worth: held-out text, drafts, recall and tasks; to the terminal, a file, its run's report."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_q3n import parallel
from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.config.data import BlendPart
from megatron_q3n.config.evaluate import EvaluateConfig
from megatron_q3n.data.blend import Part, load_blends, prepared_parts
from megatron_q3n.data.folders import cache_root
from megatron_q3n.data.rows import Rows, RowSource
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.device import choose_device
from megatron_q3n.evaluation.harness_tasks import run_tasks
from megatron_q3n.evaluation.held_out import Measure, Sums, measure_rows
from megatron_q3n.evaluation.recall import measure_recall, repeated_rows
from megatron_q3n.evaluation.results import leave, recall_results, set_results
from megatron_q3n.inference.request import Abilities
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.parallel import Parallel
from megatron_q3n.stages import trained_model

TEXT_ROWS_OF_RECALL = 64  # recall's tokens are drawn from so many rows where no text is measured
Batch = tuple[torch.Tensor, torch.Tensor]


def run(config: RunConfig, _run_dir: Path) -> int:
    """Measure and report. Leaves no run directory of its own: the results go to the checkpoint's.

    Returns: 0.
    """
    wanted = config.evaluate
    source = trained_model.find(config)
    config = trained_model.with_text_of(source, trained_model.with_model_of(source, config))
    tokenizer = trained_model.tokenizer_of(source, wanted.tokenizer)
    parts = _parts(config, tokenizer) if wanted.rows or wanted.recall_lengths else {}
    _check(config)
    device = choose_device(config)
    group = parallel.initialize(config, device)
    model = trained_model.load_model(source, config, device, group)
    results: dict[str, Any] = {"checkpoint": str(source), "sets": {}, "tasks": {}}
    for name, part in parts.items():
        rows = _held_out_rows(config, part, tokenizer, group)
        if wanted.rows:
            batches = _batches(wanted, part, rows, group)
            sums = measure_rows(model, batches, _measure(wanted, tokenizer))
            sums = Sums(_added_up(sums.text, group), _added_up(sums.drafts, group))
            results["sets"][name] = set_results(sums, wanted)
        among = name if len(parts) > 1 else None
        for length, batches in _repeated(wanted, part, rows, tokenizer, group):
            found = measure_recall(model, batches, tokenizer.vocab_size)
            results["tasks"] |= recall_results(_added_up(found, group), length, among)
    if wanted.tasks:
        results["tasks"] |= run_tasks(model, tokenizer, wanted, group)
    if group.is_leader:
        leave(results, source, wanted)
    parallel.shutdown()
    return 0


def _check(config: RunConfig) -> None:
    """Refuse before the model is loaded what it cannot do.

    Raises: UserError.
    """
    wanted = config.evaluate
    Abilities.configured(config).check([], Sampling(1), wanted.draft_depth)
    positions = config.model.max_position_embeddings
    if wanted.context_tokens + wanted.draft_depth > positions:
        raise UserError(
            f"evaluate.context_tokens={wanted.context_tokens} and {wanted.draft_depth} drafts are more than "
            f"model.max_position_embeddings={positions}; shorten the rows."
        )
    longest = max(wanted.recall_lengths, default=0)
    if 2 * longest > positions:
        raise UserError(
            f"evaluate.recall_lengths: {longest} tokens, twice, are more than "
            f"model.max_position_embeddings={positions}; leave them out."
        )
    if wanted.tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluate.tasks needs lm-evaluation-harness, which is not installed: pip install -r requirements-eval.txt."
        )
    if wanted.tasks_dir is not None and not Path(wanted.tasks_dir).is_dir():
        raise UserError(
            f"evaluate.tasks_dir={wanted.tasks_dir}: no such folder. Give the one with the tasks' .yaml files."
        )


def _parts(config: RunConfig, tokenizer: TextTokenizer) -> dict[str, Part]:
    """Return the prepared folders to read, by name.

    Raises: UserError if one is missing, damaged, too short, or of another tokenizer.
    """
    wanted = config.evaluate
    if wanted.sets:
        found = {text.name: prepared_parts([BlendPart(path=text.path)])[0] for text in wanted.sets}
    else:
        blend = load_blends(config).validation
        names = ["validation"] if len(blend) == 1 else [part.path.name for part in blend]
        found = dict(zip(names, blend))
    for name, part in found.items():
        if part.manifest.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"evaluate: {name} ({part.path}) was prepared with another tokenizer than the model's; make it again "
                "with tools/prepare_data.py and the model's."
            )
        if part.manifest.num_tokens <= wanted.context_tokens:
            raise UserError(
                f"evaluate: {name} ({part.path}) holds {part.manifest.num_tokens} tokens, less than one row of "
                f"evaluate.context_tokens={wanted.context_tokens} plus 1."
            )
    return found


def _held_out_rows(config: RunConfig, part: Part, tokenizer: TextTokenizer, group: Parallel) -> Rows:
    """Return the rows of a folder, in an order of the seed's. A collective call: the leader builds the index."""
    wanted = config.evaluate
    if not group.is_leader:
        group.barrier()
    source = RowSource(
        cache_root(config.data.cache_dir), wanted.context_tokens, wanted.seed, tokenizer, group.is_leader
    )
    rows = source.held_out_rows(part, wanted.rows or TEXT_ROWS_OF_RECALL)
    if group.is_leader:
        group.barrier()
    return rows


def _rows_there(wanted: EvaluateConfig, part: Part) -> int:
    """Return after how many rows they repeat."""
    return (part.manifest.num_tokens - 1) // wanted.context_tokens


def _batches(wanted: EvaluateConfig, part: Part, rows: Rows, group: Parallel) -> list[Batch]:
    """Return this replica's rows [N,T+1] and which of them count [N]; every replica gets as many batches."""
    count = min(wanted.rows, _rows_there(wanted, part))
    batches = []
    for numbers in _shares(count, wanted.batch_rows, group):
        items = [rows[number % count] for number in numbers]
        tokens = torch.stack([torch.cat([i["tokens"], i["labels"][-1:]]) for i in items])
        batches.append((tokens, torch.tensor([number < count for number in numbers])))
    return batches


def _repeated(
    wanted: EvaluateConfig, part: Part, rows: Rows, tokenizer: TextTokenizer, group: Parallel
) -> Iterator[tuple[int, list[Batch]]]:
    """Yield each length of the recall probe with this replica's rows, of tokens of the text that is measured too."""
    if not wanted.recall_lengths:
        return
    count = min(wanted.rows or TEXT_ROWS_OF_RECALL, _rows_there(wanted, part))
    text = np.concatenate([rows[number]["tokens"].numpy() for number in range(count)])
    for length in wanted.recall_lengths:
        size = max(1, wanted.batch_rows * wanted.context_tokens // (2 * length))
        size = min(size, wanted.recall_rows)
        yield (
            length,
            [
                (
                    repeated_rows(text, tokenizer.eod, length, numbers, wanted.seed),
                    torch.tensor([number < wanted.recall_rows for number in numbers]),
                )
                for numbers in _shares(wanted.recall_rows, size, group)
            ],
        )


def _shares(count: int, size: int, group: Parallel) -> Iterator[list[int]]:
    """Yield the numbers of this replica's batches of `count` rows; those from `count` on only fill a batch up."""
    for first in range(0, count, size * group.data_size):
        yield [first + group.data_rank * size + i for i in range(size)]


def _measure(wanted: EvaluateConfig, tokenizer: TextTokenizer) -> Measure:
    return Measure(
        torch.from_numpy(tokenizer.token_num_bytes()),
        wanted.position_buckets,
        wanted.draft_depth,
        wanted.draft_stride,
        wanted.seed,
        tokenizer.vocab_size,
    )


def _added_up(sums: torch.Tensor, group: Parallel) -> torch.Tensor:
    """Add up over replicas. A collective call."""
    if group.data_size == 1:
        return sums
    total = sums.to(torch.cuda.current_device())
    torch.distributed.all_reduce(total, group=group.groups.dp)
    return total.cpu()
