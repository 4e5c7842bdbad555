"""What a checkpoint is worth: held-out text, drafts, and tasks; to the terminal, a file, and its run's report."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from megatron_q3n import parallel
from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.config.data import BlendPart
from megatron_q3n.config.evaluate import EvaluateConfig
from megatron_q3n.data.blend import Part, load_blends, prepared_parts
from megatron_q3n.data.folders import cache_root
from megatron_q3n.data.rows import RowSource
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.device import choose_device
from megatron_q3n.inference.held_out import Measure, Sums, measure_rows
from megatron_q3n.inference.request import Abilities
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.parallel import Parallel
from megatron_q3n.stages import trained_model
from megatron_q3n.stages.evaluation_results import leave, set_results
from megatron_q3n.stages.harness_tasks import run_tasks


def run(config: RunConfig, _run_dir: Path) -> int:
    """Measure and report. Leaves no run directory of its own: the results go to the checkpoint's.

    Returns: 0.
    """
    wanted = config.evaluate
    source = trained_model.find(config)
    config = trained_model.with_model_of(source, config)
    tokenizer = trained_model.tokenizer_of(source, wanted.tokenizer)
    parts = _parts(config, tokenizer) if wanted.rows else {}
    _check(config)
    device = choose_device(config)
    group = parallel.initialize(config, device)
    model = trained_model.load_model(source, config, device, group)
    results: dict[str, Any] = {"checkpoint": str(source), "sets": {}, "tasks": {}}
    for name, part in parts.items():
        batches = _batches(config, part, tokenizer, group)
        sums = measure_rows(model, batches, _measure(wanted, tokenizer))
        results["sets"][name] = set_results(_added_up(sums, group), wanted)
    if wanted.tasks:
        results["tasks"] = run_tasks(model, tokenizer, wanted, group)
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
    if wanted.tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluate.tasks needs lm-evaluation-harness, which is not installed: "
            "pip install -r requirements-eval.txt."
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


def _batches(
    config: RunConfig, part: Part, tokenizer: TextTokenizer, group: Parallel
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return this replica's rows [N,T+1] and which of them count [N]; every replica gets as many batches."""
    wanted = config.evaluate
    if not group.is_leader:
        group.barrier()
    source = RowSource(
        cache_root(config.data.cache_dir),
        wanted.context_tokens,
        wanted.seed,
        tokenizer,
        group.is_leader,
    )
    rows = source.held_out_rows(part, wanted.rows)
    if group.is_leader:
        group.barrier()
    there = (part.manifest.num_tokens - 1) // wanted.context_tokens  # no row twice
    count, size = min(wanted.rows, there), wanted.batch_rows
    batches = []
    for first in range(0, count, size * group.data_size):
        numbers = [first + group.data_rank * size + i for i in range(size)]
        items = [rows[number % count] for number in numbers]
        tokens = torch.stack([torch.cat([i["tokens"], i["labels"][-1:]]) for i in items])
        batches.append((tokens, torch.tensor([number < count for number in numbers])))
    return batches


def _measure(wanted: EvaluateConfig, tokenizer: TextTokenizer) -> Measure:
    return Measure(
        torch.from_numpy(tokenizer.token_num_bytes()),
        wanted.position_buckets,
        wanted.draft_depth,
        wanted.draft_stride,
        wanted.seed,
        tokenizer.vocab_size,
    )


def _added_up(sums: Sums, group: Parallel) -> Sums:
    """Add up over replicas. A collective call."""
    if group.data_size == 1:
        return sums
    device = torch.cuda.current_device()
    text, drafts = sums.text.to(device), sums.drafts.to(device)
    for tensor in (text, drafts):
        torch.distributed.all_reduce(tensor, group=group.groups.dp)
    return Sums(text.cpu(), drafts.cpu())
