"""The samples of reinforcement learning in a run's report: the newest held-out answers, and the newest rollout."""

from pathlib import Path
from typing import Any

from megatron_q3n.metrics import sample_tables
from megatron_q3n.metrics.report import page

CARDS = {sample_tables.HELD_OUT: "Answers to held-out prompts", sample_tables.ROLLOUT: "The last rollout"}
SHOWN_COLUMNS = ("question", "answer", "text", "score", "reward", "advantage", "tokens", "failure")
SHOWN_ROWS = 24


def sample_cards(run_dir: Path) -> list[str]:
    """Return a card for each kind of samples that the run left."""
    files = {title: sample_tables.newest(run_dir, kind) for kind, title in CARDS.items()}
    return [_card(title, file) for title, file in files.items() if file is not None]


def _card(title: str, file: Path) -> str:
    places = [sample_tables.COLUMNS.index(column) for column in SHOWN_COLUMNS]
    found = sample_tables.rows(file)[:SHOWN_ROWS]
    body = page.table(([_plain(row[place]) for place in places] for row in found), SHOWN_COLUMNS)
    note = f"The first {len(found)} of samples/{file.name}; the answer is the right one, the text the model's."
    return page.card(title, body, unit=f"after step {int(file.stem[-7:]):,}", note=note, wide=True)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)
