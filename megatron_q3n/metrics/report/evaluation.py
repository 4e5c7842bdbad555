"""What the evaluate stage found, as cards of a run's report: held-out text, drafts, tasks. Nothing without them."""

from collections.abc import Iterator
from typing import Any

from megatron_q3n.metrics.report import page


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
            note = (
                "Share kept by the model itself at each depth, where all drafts before were kept."
            )
            cards.append(page.card(f"Drafts: {name}", drafts, note=note))
    tasks = [
        (task, *pair) for task, scores in found.get("tasks", {}).items() for pair in scores.items()
    ]
    if tasks:
        rows = [(task, name, f"{value:.4g}") for task, name, value in tasks]
        cards.append(page.card("Tasks", page.table(rows, ("task", "measure", "value"))))
    return cards


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
