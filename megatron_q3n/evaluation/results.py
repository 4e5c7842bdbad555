"""What an evaluation found, as numbers with names: to the terminal, a file, and the run's report."""

import math
from pathlib import Path
from typing import Any

import torch

from megatron_q3n import run_directory
from megatron_q3n.config import UserError
from megatron_q3n.config.evaluate import EvaluateConfig
from megatron_q3n.evaluation.held_out import Sums
from megatron_q3n.metrics.report import write_report
from megatron_q3n.metrics.report.run_files import EVALUATION_FILE

RECALL_TASK = "repeat {length} tokens"


def set_results(sums: Sums, wanted: EvaluateConfig) -> dict[str, Any]:
    """Turn sums into what is reported of a data set, whole and by stretch of positions."""
    stretch = wanted.context_tokens // wanted.position_buckets
    results = _text_results(sums.text.sum(0).tolist())
    if wanted.draft_depth:
        results["drafts"] = _draft_results(sums.drafts.sum(0))
    results["by_position"] = []
    for number in range(wanted.position_buckets):
        found: dict[str, Any] = {"from": number * stretch, "to": (number + 1) * stretch}
        found |= _text_results(sums.text[number].tolist())
        if wanted.draft_depth and sums.drafts[number, 0, 0]:
            found["drafts"] = _draft_results(sums.drafts[number])
        results["by_position"].append(found)
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
    """Name acceptance, given that all drafts before were kept, and tokens per pass of the trunk: 1 and those kept."""
    places = sums_DC[0, 0].item()
    results: dict[str, Any] = {"places": int(places)}
    for name, reached, kept in (("greedy", 1, 2), ("drawn", 3, 4)):
        results[name] = {
            "acceptance": [(row[kept] / row[reached]).item() if row[reached] else None for row in sums_DC],
            "tokens_per_pass": 1 + (sums_DC[:, kept].sum() / places).item(),
        }
    return results


def recall_results(sums: torch.Tensor, length: int, name: str | None) -> dict[str, dict[str, float]]:
    """Name one length's sums [2,3] of `inference.recall` as a task; `name`: the set, where there are several."""
    of = f" of {name}" if name else ""
    nats, right, tokens = sums[1].tolist()
    return {
        f"{RECALL_TASK.format(length=length)}{of}": {
            "accuracy": right / tokens,
            "loss": nats / tokens,
            "loss of the first copy": (sums[0, 0] / sums[0, 2]).item(),
        }
    }


def leave(results: dict[str, Any], source: Path, wanted: EvaluateConfig) -> None:
    """Print, and leave the results where they belong.

    Raises: UserError if the file cannot be written.
    """
    print("\n".join(_lines(results)))
    run_dir = source.parent.parent
    is_run = (run_dir / run_directory.CONFIG).is_file()
    if wanted.output is None and not is_run:
        return
    path = Path(wanted.output) if wanted.output else run_dir / EVALUATION_FILE
    try:
        run_directory.write_json(path, results)
    except OSError as error:
        raise UserError(f"evaluate.output={path}: {error}") from None
    print(f"results       {path}")
    if wanted.output is None:
        print(f"report        {write_report(run_dir)}")


def _lines(results: dict[str, Any]) -> list[str]:
    """Say the results in a few lines."""
    lines = [f"checkpoint    {results['checkpoint']}"]
    for name, found in results["sets"].items():
        lines.append(
            f"{name:<13} perplexity {found['perplexity']:.3f}, {found['bits_per_byte']:.4f} bits per byte over "
            f"{found['tokens']:,} tokens"
        )
        for kind in ("greedy", "drawn") if "drafts" in found else ():
            drafts = found["drafts"][kind]
            shares = ", ".join("–" if s is None else f"{s:.1%}" for s in drafts["acceptance"])
            lines.append(f"  {kind} drafts: {drafts['tokens_per_pass']:.3f} tokens per pass; kept by depth {shares}")
    for task, scores in results["tasks"].items():
        lines.append(f"{task:<13} " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
    return lines
