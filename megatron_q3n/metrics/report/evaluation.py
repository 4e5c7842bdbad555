"""What the evaluate stage found, as cards: held-out text, drafts, recall, tasks. Nothing without them."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_q3n.metrics.report import page
from megatron_q3n.metrics.report.recall import is_recall, recall_cards, recall_comparison
from megatron_q3n.metrics.report.variants import Variant, mean_and_spread, spread_text


def evaluation_cards(found: Any) -> list[str]:
    """Return the cards of evaluation.json; none for a run that was not evaluated."""
    if not isinstance(found, dict):
        return []
    cards = []
    for name, results in found.get("sets", {}).items():
        text = page.table(_text_rows(results), ("tokens", "perplexity", "bits per byte"))
        cards.append(page.card(f"Held-out text: {name}", text, note="By position in the context."))
        if "drafts" in results:
            drafts = page.table(_draft_rows(results), _draft_header(results))
            note = "Share kept by the model itself at each depth, where all drafts before were kept."
            cards.append(page.card(f"Drafts: {name}", drafts, note=note))
    cards += recall_cards(found)
    tasks = [
        (task, *pair)
        for task, scores in found.get("tasks", {}).items()
        for pair in scores.items()
        if not is_recall(task)
    ]
    if tasks:
        rows = [(task, name, f"{value:.4g}") for task, name, value in tasks]
        cards.append(page.card("Tasks", page.table(rows, ("task", "measure", "value"))))
    return cards


def evaluation_comparison(variants: Sequence[Variant]) -> list[str]:
    """Return the cards of variants side by side: recall, and the loss on held-out text by position."""
    every = [run.evaluation for variant in variants for run in variant.runs]
    sets = [found.get("sets", {}) for found in every if isinstance(found, dict)]
    names = dict.fromkeys(name for found in sets for name in found)
    return [*recall_comparison(variants), *(_text_comparison(name, variants) for name in names)]


def _text_comparison(name: str, variants: Sequence[Variant]) -> str:
    """Return a table: a row for each stretch of positions, a column for each variant."""
    losses = [[_losses(run.evaluation, name) for run in variant.runs] for variant in variants]
    places = dict.fromkeys(place for runs in losses for run in runs for place in run)
    rows = [
        (place, *(spread_text(*mean_and_spread([run.get(place) for run in runs])) for runs in losses))
        for place in places
    ]
    table = page.table(rows, ("tokens", *(variant.name for variant in variants)), numbers=True)
    title, note = f"Held-out text: {name}", "By position in the context."
    return page.card(title, table, unit="nats/token", note=note, wide=len(variants) > 3)


def _losses(found: Any, name: str) -> dict[str, float]:
    results = found.get("sets", {}).get(name) if isinstance(found, dict) else None
    return {} if results is None else {where: part["loss"] for where, part in _parts(results)}


def _text_rows(results: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for where, part in _parts(results):
        yield where, f"{part['perplexity']:.3f}", f"{part['bits_per_byte']:.4f}"


def _draft_header(results: dict[str, Any]) -> list[str]:
    depths = len(results["drafts"]["greedy"]["acceptance"])
    return ["tokens", "drafts", "per pass", *(f"depth {k}" for k in range(1, depths + 1))]


def _draft_rows(results: dict[str, Any]) -> Iterator[list[str]]:
    for where, part in _parts(results):
        for kind in ("greedy", "drawn") if "drafts" in part else ():
            drafts = part["drafts"][kind]
            shares = ["–" if share is None else f"{share:.1%}" for share in drafts["acceptance"]]
            yield [where, kind, f"{drafts['tokens_per_pass']:.3f}", *shares]


def _parts(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "all", results
    for part in results["by_position"]:
        yield f"{part['from']:,} to {part['to']:,}", part
