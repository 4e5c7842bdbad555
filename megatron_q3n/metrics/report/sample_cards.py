"""Sample tables of reinforcement learning in the report: the newest held-out completions and the newest rollout."""

from pathlib import Path
from typing import Any

from megatron_q3n.metrics import sample_tables
from megatron_q3n.metrics.report import page

CARDS = {sample_tables.HELD_OUT: "Completions of held-out prompts", sample_tables.ROLLOUT: "Latest rollout"}
SHOWN_COLUMNS = ("question", "answer", "text", "score", "reward", "advantage", "tokens", "failure")
SHOWN_ROWS = 24


def sample_cards(run_dir: Path) -> list[str]:
    """Return a card for each kind of samples in the run directory."""
    files = {title: sample_tables.newest(run_dir, kind) for kind, title in CARDS.items()}
    return [_card(title, file) for title, file in files.items() if file is not None]


def _card(title: str, file: Path) -> str:
    indices = [sample_tables.COLUMNS.index(column) for column in SHOWN_COLUMNS]
    rows = sample_tables.rows(file)[:SHOWN_ROWS]
    body = page.table(([_plain(row[index]) for index in indices] for row in rows), SHOWN_COLUMNS)
    note = f"First {len(rows)} rows of samples/{file.name}. answer: the reference answer; text: the model's completion."
    return page.card(title, body, unit=f"after step {int(file.stem[-7:]):,}", note=note, wide=True)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)
