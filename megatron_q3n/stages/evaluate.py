"""Evaluate stage: held-out loss, draft acceptance, copy recall and lm-evaluation-harness tasks of a checkpoint.

Results go to the terminal, to a JSON file and to the report of the checkpoint's run; the stage has no run directory.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_q3n import parallel, run_directory
from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.config.data import BlendPart
from megatron_q3n.config.evaluate import EvaluateConfig
from megatron_q3n.data.blend import PreparedFolder, load_blends, verify_folders
from megatron_q3n.data.folders import cache_root
from megatron_q3n.data.sample_datasets import SampleDataset, SampleDatasetBuilder
from megatron_q3n.data.tokenizer import TextTokenizer
from megatron_q3n.device import select_device
from megatron_q3n.evaluation.copy_recall import measure_recall, repeated_sequences
from megatron_q3n.evaluation.harness_tasks import run_tasks
from megatron_q3n.evaluation.held_out_loss import EvaluationSums, MeasurementSettings, measure_sequences
from megatron_q3n.evaluation.results import (
    earlier_results,
    results_path,
    summarize_data_set,
    summarize_recall,
    write_results,
)
from megatron_q3n.inference.limits import GenerationLimits
from megatron_q3n.inference.sampling import Sampling
from megatron_q3n.parallel import Parallel
from megatron_q3n.stages import chat_format, trained_model

# sequences from which recall samples its tokens when no held-out text is measured
RECALL_TEXT_SEQUENCES = 64
Batch = tuple[torch.Tensor, torch.Tensor]


def run(config: RunConfig, _run_dir: Path) -> int:
    """Run the configured measurements and write the results.

    Returns: 0.
    """
    settings = config.evaluate
    source = trained_model.find_checkpoint(config)
    if (path := results_path(source, settings)) is not None:
        run_directory.check_writable(path, "evaluate.output", replaced=True)
    config = trained_model.with_checkpoint_data(source, trained_model.with_checkpoint_model(source, config))
    tokenizer = trained_model.checkpoint_tokenizer(source, settings.tokenizer)
    data_sets = _find_data_sets(config, tokenizer) if settings.num_sequences or settings.recall_lengths else {}
    _check(config)
    earlier = earlier_results(source, settings)
    device = select_device(config)
    group = parallel.initialize(config, device)
    model = trained_model.load_model(source, config, device, group)
    results: dict[str, Any] = {"checkpoint": str(source), "sets": {}, "tasks": {}}
    for name, folder in data_sets.items():
        dataset = _build_held_out_dataset(config, folder, tokenizer, group)
        if settings.num_sequences:
            batches = _batches(settings, folder, dataset, group)
            sums = measure_sequences(model, batches, _measurement_settings(settings, tokenizer))
            sums = EvaluationSums(_sum_over_replicas(sums.text, group), _sum_over_replicas(sums.drafts, group))
            results["sets"][name] = summarize_data_set(sums, settings)
        data_set_name = name if len(data_sets) > 1 else None
        for length, batches in _recall_batches(settings, folder, dataset, tokenizer, group):
            recall_sums = measure_recall(model, batches, tokenizer.vocab_size)
            results["tasks"] |= summarize_recall(_sum_over_replicas(recall_sums, group), length, data_set_name)
    if settings.tasks:
        stop_tokens = chat_format.stop_tokens(source, tokenizer)
        results["tasks"] |= run_tasks(model, tokenizer, stop_tokens, settings, group)
    if group.is_leader:
        write_results(results, earlier, source, settings)
    parallel.shutdown()
    return 0


def _check(config: RunConfig) -> None:
    """Check the settings against the model before it is loaded.

    Raises: UserError if the model cannot draft or has too few positions, or if task files or lm-eval are missing.
    """
    settings = config.evaluate
    GenerationLimits.from_config(config).check([], Sampling(1), settings.draft_depth)
    positions = config.model.max_position_embeddings
    if settings.context_tokens + settings.draft_depth > positions:
        raise UserError(
            f"evaluate.context_tokens={settings.context_tokens} plus evaluate.draft_depth={settings.draft_depth} "
            f"exceed model.max_position_embeddings={positions}; lower evaluate.context_tokens."
        )
    longest = max(settings.recall_lengths, default=0)
    if 2 * longest > positions:
        raise UserError(
            f"evaluate.recall_lengths: two copies of {longest} tokens exceed "
            f"model.max_position_embeddings={positions}; remove this length."
        )
    if settings.tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluate.tasks needs lm-evaluation-harness, which is not installed: pip install -r requirements-eval.txt."
        )
    if settings.tasks_dir is not None and not Path(settings.tasks_dir).is_dir():
        raise UserError(
            f"evaluate.tasks_dir={settings.tasks_dir}: no such folder. Set it to the folder of the tasks' .yaml files."
        )


def _find_data_sets(config: RunConfig, tokenizer: TextTokenizer) -> dict[str, PreparedFolder]:
    """Return the prepared folders to evaluate on, by name.

    Raises: UserError if one is missing, damaged, too short, or prepared with another tokenizer.
    """
    settings = config.evaluate
    if settings.sets:
        folders = {text.name: verify_folders([BlendPart(path=text.path)])[0] for text in settings.sets}
    else:
        blend = load_blends(config).validation
        names = ["validation"] if len(blend) == 1 else [folder.path.name for folder in blend]
        folders = dict(zip(names, blend))
    for name, folder in folders.items():
        if folder.manifest.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"evaluate: {name} ({folder.path}) was prepared with another tokenizer than the model's; prepare it "
                "again with tools/prepare_data.py and the model's tokenizer."
            )
        if folder.manifest.num_tokens <= settings.context_tokens:
            raise UserError(
                f"evaluate: {name} ({folder.path}) has {folder.manifest.num_tokens} tokens, fewer than one sequence of "
                f"evaluate.context_tokens={settings.context_tokens} plus 1; lower it or prepare more text."
            )
    return folders


def _build_held_out_dataset(
    config: RunConfig, folder: PreparedFolder, tokenizer: TextTokenizer, group: Parallel
) -> SampleDataset:
    """Return the sequences of a folder, shuffled by the seed. A collective call: the leader builds the index first."""
    settings = config.evaluate
    if not group.is_leader:
        group.barrier()
    source = SampleDatasetBuilder(
        cache_root(config.data.cache_dir), settings.context_tokens, settings.seed, tokenizer, group.is_leader
    )
    dataset = source.build_held_out(folder, settings.num_sequences or RECALL_TEXT_SEQUENCES)
    if group.is_leader:
        group.barrier()
    return dataset


def _num_available_sequences(settings: EvaluateConfig, folder: PreparedFolder) -> int:
    """Return the number of distinct sequences in a folder."""
    return (folder.manifest.num_tokens - 1) // settings.context_tokens


def _batches(settings: EvaluateConfig, folder: PreparedFolder, dataset: SampleDataset, group: Parallel) -> list[Batch]:
    """Return this replica's batches of (tokens [N,T+1], mask [N]); all replicas get the same number of batches."""
    count = min(settings.num_sequences, _num_available_sequences(settings, folder))
    batches = []
    for indices in _replica_indices(count, settings.batch_size, group):
        items = [dataset[index % count] for index in indices]
        tokens = torch.stack([torch.cat([i["tokens"], i["labels"][-1:]]) for i in items])
        batches.append((tokens, torch.tensor([index < count for index in indices])))
    return batches


def _recall_batches(
    settings: EvaluateConfig, folder: PreparedFolder, dataset: SampleDataset, tokenizer: TextTokenizer, group: Parallel
) -> Iterator[tuple[int, list[Batch]]]:
    """Yield each length of the copy recall probe with this replica's batches; tokens are those of the measured text."""
    if not settings.recall_lengths:
        return
    count = min(settings.num_sequences or RECALL_TEXT_SEQUENCES, _num_available_sequences(settings, folder))
    text = np.concatenate([dataset[index]["tokens"].numpy() for index in range(count)])
    for length in settings.recall_lengths:
        size = max(1, settings.batch_size * settings.context_tokens // (2 * length))
        size = min(size, settings.num_recall_sequences)
        yield (
            length,
            [
                (
                    repeated_sequences(text, tokenizer.eod, length, indices, settings.seed),
                    torch.tensor([index < settings.num_recall_sequences for index in indices]),
                )
                for indices in _replica_indices(settings.num_recall_sequences, size, group)
            ],
        )


def _replica_indices(count: int, size: int, group: Parallel) -> Iterator[list[int]]:
    """Yield the indices of this replica's batches of `count` sequences; indices from `count` on are padding."""
    for first in range(0, count, size * group.data_size):
        yield [first + group.data_rank * size + i for i in range(size)]


def _measurement_settings(settings: EvaluateConfig, tokenizer: TextTokenizer) -> MeasurementSettings:
    return MeasurementSettings(
        torch.from_numpy(tokenizer.token_num_bytes()),
        settings.position_buckets,
        settings.draft_depth,
        settings.draft_stride,
        settings.seed,
        tokenizer.vocab_size,
    )


def _sum_over_replicas(sums: torch.Tensor, group: Parallel) -> torch.Tensor:
    """Return the sum over replicas. A collective call."""
    if group.data_size == 1:
        return sums
    total = sums.to(torch.cuda.current_device())
    torch.distributed.all_reduce(total, group=group.groups.dp)
    return total.cpu()
