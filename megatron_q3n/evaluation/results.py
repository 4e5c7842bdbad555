"""Evaluation results: named numbers for the terminal, evaluation.json and the run's report."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_q3n import run_directory
from megatron_q3n.config import UserError
from megatron_q3n.config.evaluate import EvaluateConfig
from megatron_q3n.evaluation.held_out_loss import EvaluationSums
from megatron_q3n.metrics.report import write_report
from megatron_q3n.metrics.report.evaluation import EARLIER
from megatron_q3n.metrics.report.run_files import EVALUATION_FILE

RECALL_TASK = "repeat {length} tokens"
# keys of evaluation.json
KIND_LABELS = {"greedy": "greedy", "drawn": "sampled"}


def summarize_data_set(sums: EvaluationSums, settings: EvaluateConfig) -> dict[str, Any]:
    """Return the results of one data set, in total and by position bucket."""
    bucket_tokens = settings.context_tokens // settings.position_buckets
    results = _text_results(sums.text.sum(0).tolist())
    if settings.draft_depth:
        results["drafts"] = _draft_results(sums.drafts.sum(0))
    results["by_position"] = []
    for bucket in range(settings.position_buckets):
        entry: dict[str, Any] = {"from": bucket * bucket_tokens, "to": (bucket + 1) * bucket_tokens}
        entry |= _text_results(sums.text[bucket].tolist())
        if settings.draft_depth and sums.drafts[bucket, 0, 0]:
            entry["drafts"] = _draft_results(sums.drafts[bucket])
        results["by_position"].append(entry)
    return results


def _text_results(sums: list[float]) -> dict[str, Any]:
    nats, tokens, num_bytes = sums
    return {
        "tokens": int(tokens),
        "bytes": int(num_bytes),
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / num_bytes,
    }


def _draft_results(sums_DC: torch.Tensor) -> dict[str, Any]:
    """Return acceptance rates by depth (given that earlier drafts were accepted) and tokens per forward pass.

    Tokens per forward pass of the trunk are 1 plus the mean number of accepted drafts.
    """
    positions = sums_DC[0, 0].item()
    results: dict[str, Any] = {"places": int(positions)}
    for name, reached, accepted in (("greedy", 1, 2), ("drawn", 3, 4)):
        results[name] = {
            "acceptance": [(row[accepted] / row[reached]).item() if row[reached] else None for row in sums_DC],
            "tokens_per_pass": 1 + (sums_DC[:, accepted].sum() / positions).item(),
        }
    return results


def summarize_recall(sums: torch.Tensor, length: int, name: str | None) -> dict[str, dict[str, float]]:
    """Return one length's sums [2,3] of `copy_recall` as a task; `name` is the data set if there are several."""
    of = f" of {name}" if name else ""
    nats, right, tokens = sums[1].tolist()
    return {
        f"{RECALL_TASK.format(length=length)}{of}": {
            "accuracy": right / tokens,
            "loss": nats / tokens,
            "loss of the first copy": (sums[0, 0] / sums[0, 2]).item(),
        }
    }


def results_path(source: Path, settings: EvaluateConfig) -> Path | None:
    """Return the file for the results: that of the settings, or that of the checkpoint's run; None without either."""
    if settings.output is not None:
        return Path(settings.output)
    run_dir = source.parent.parent
    return run_dir / EVALUATION_FILE if (run_dir / run_directory.CONFIG).is_file() else None


def earlier_results(source: Path, settings: EvaluateConfig) -> list[dict[str, Any]]:
    """Return the results that the output file holds already, newest first; the new ones are put before them.

    Raises: UserError if the file holds something else, which would be lost.
    """
    path = results_path(source, settings)
    if path is None or not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        earlier = [{k: v for k, v in content.items() if k != EARLIER}, *content.get(EARLIER, [])]
        is_readable = all({"checkpoint", "sets", "tasks"} <= set(entry) for entry in earlier)
    except (OSError, ValueError, AttributeError, TypeError):
        is_readable = False
    if not is_readable:
        raise UserError(
            f"{path} exists and holds no results of an evaluation, or is damaged; it is left untouched. Remove it, or "
            "choose another file with evaluate.output=…."
        )
    return earlier


def write_results(
    results: dict[str, Any], earlier: list[dict[str, Any]], source: Path, settings: EvaluateConfig
) -> None:
    """Print the results, write them before the earlier ones to a JSON file, and update the report of the run.

    Raises: UserError if the file cannot be written.
    """
    print("\n".join(_lines(results)))
    path = results_path(source, settings)
    if path is None:
        return
    # the same measurement of the same checkpoint gives the same numbers
    others = [entry for entry in earlier if entry != json.loads(json.dumps(results))]
    try:
        run_directory.write_json(path, results | ({EARLIER: others} if others else {}))
    except OSError as error:
        raise UserError(f"evaluate.output={path}: {error}") from None
    print(f"results       {path}")
    if settings.output is None:
        _update_report(path.parent)


def _update_report(run_dir: Path) -> None:
    try:
        print(f"report        {write_report(run_dir)}")
    except OSError as error:
        print(f"warning: the report of {run_dir} could not be updated: {error}", file=sys.stderr)


def _lines(results: dict[str, Any]) -> list[str]:
    """Return the results as lines of text."""
    lines = [f"checkpoint    {results['checkpoint']}"]
    for name, entry in results["sets"].items():
        lines.append(
            f"{name:<13} perplexity {entry['perplexity']:.3f}, {entry['bits_per_byte']:.4f} bits per byte over "
            f"{entry['tokens']:,} tokens"
        )
        for kind in KIND_LABELS if "drafts" in entry else ():
            drafts = entry["drafts"][kind]
            rates = ", ".join("–" if rate is None else f"{rate:.1%}" for rate in drafts["acceptance"])
            label = KIND_LABELS[kind]
            lines.append(
                f"  {label} drafts: {drafts['tokens_per_pass']:.3f} tokens per forward pass; acceptance rate by depth "
                f"{rates}"
            )
    for task, scores in results["tasks"].items():
        lines.append(f"{task:<13} " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
    return lines
