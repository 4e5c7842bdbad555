"""Cards of the evaluate stage's results: held-out loss, draft acceptance, copy recall, tasks."""

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from megatron_q3n.metrics.report import page
from megatron_q3n.metrics.report.copy_recall import is_recall, recall_cards, recall_comparison
from megatron_q3n.metrics.report.variants import Variant, mean_and_spread, spread_text

# key of evaluation.json: the results of earlier evaluations, newest first
EARLIER = "earlier"


def evaluation_cards(evaluation: Any) -> list[str]:
    """Return the cards of evaluation.json, then those of earlier results; none for a run that was not evaluated."""
    if not isinstance(evaluation, dict):
        return []
    cards = [*_text_cards(evaluation, ""), *recall_cards(evaluation), *_task_cards(evaluation, "")]
    for number, earlier in enumerate(evaluation.get(EARLIER, []), start=1):
        label = f" (earlier {number}: {PurePath(str(earlier['checkpoint'])).name})"
        cards += [*_text_cards(earlier, label), *_task_cards(earlier, label, with_recall=True)]
    return cards


def _text_cards(evaluation: dict[str, Any], label: str) -> list[str]:
    cards = []
    for name, results in evaluation.get("sets", {}).items():
        text = page.table(_text_rows(results), ("tokens", "perplexity", "bits per byte"))
        cards.append(page.card(f"Held-out text: {name}{label}", text, note="By position in the context."))
        if "drafts" in results:
            drafts = page.table(_draft_rows(results), _draft_header(results))
            note = "Acceptance rate at each depth, given that all earlier drafts were accepted."
            cards.append(page.card(f"Draft acceptance: {name}{label}", drafts, note=note))
    return cards


def _task_cards(evaluation: dict[str, Any], label: str, *, with_recall: bool = False) -> list[str]:
    """Return the table of the tasks; copy recall has a chart of its own, and a table for earlier results."""
    tasks = [
        (task, *pair)
        for task, scores in evaluation.get("tasks", {}).items()
        for pair in scores.items()
        if with_recall or not is_recall(task)
    ]
    rows = [(task, name, f"{value:.4g}") for task, name, value in tasks]
    return [page.card(f"Tasks{label}", page.table(rows, ("task", "metric", "value")))] if rows else []


def evaluation_comparison(variants: Sequence[Variant]) -> list[str]:
    """Return the comparison cards of the variants: copy recall, and held-out loss by position."""
    evaluations = [run.evaluation for variant in variants for run in variant.runs]
    sets = [evaluation.get("sets", {}) for evaluation in evaluations if isinstance(evaluation, dict)]
    names = dict.fromkeys(name for data_sets in sets for name in data_sets)
    return [*recall_comparison(variants), *(_text_comparison(name, variants) for name in names)]


def _text_comparison(name: str, variants: Sequence[Variant]) -> str:
    """Return a table with a row for each position bucket and a column for each variant."""
    losses = [[_losses(run.evaluation, name) for run in variant.runs] for variant in variants]
    buckets = dict.fromkeys(bucket for runs in losses for run in runs for bucket in run)
    rows = [
        (bucket, *(spread_text(*mean_and_spread([run.get(bucket) for run in runs])) for runs in losses))
        for bucket in buckets
    ]
    table = page.table(rows, ("tokens", *(variant.name for variant in variants)), numbers=True)
    title, note = f"Held-out text: {name}", "By position in the context."
    return page.card(title, table, unit="nats/token", note=note, wide=len(variants) > 3)


def _losses(evaluation: Any, name: str) -> dict[str, float]:
    results = evaluation.get("sets", {}).get(name) if isinstance(evaluation, dict) else None
    return {} if results is None else {bucket: part["loss"] for bucket, part in _parts(results)}


def _text_rows(results: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for bucket, part in _parts(results):
        yield bucket, f"{part['perplexity']:.3f}", f"{part['bits_per_byte']:.4f}"


def _draft_header(results: dict[str, Any]) -> list[str]:
    depths = len(results["drafts"]["greedy"]["acceptance"])
    return ["tokens", "drafts", "tokens per pass", *(f"depth {k}" for k in range(1, depths + 1))]


def _draft_rows(results: dict[str, Any]) -> Iterator[list[str]]:
    for bucket, part in _parts(results):
        for kind, label in (("greedy", "greedy"), ("drawn", "sampled")) if "drafts" in part else ():
            drafts = part["drafts"][kind]
            rates = ["–" if rate is None else f"{rate:.1%}" for rate in drafts["acceptance"]]
            yield [bucket, label, f"{drafts['tokens_per_pass']:.3f}", *rates]


def _parts(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "all", results
    for part in results["by_position"]:
        yield f"{part['from']:,} to {part['to']:,}", part
