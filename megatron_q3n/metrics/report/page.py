"""HTML building blocks of the page: document, sections, tiles, cards, tables. Plain text is escaped here."""

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_q3n.metrics.report.style import CSS


def document(title: str, subtitle: str, body: Iterable[str]) -> str:
    """Return a complete page; `title` and `subtitle` are plain text, `body` is HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>
{"".join(body)}
</main>
</body>
</html>
"""


def section(title: str, cards: Iterable[str]) -> str:
    """Return a heading and a grid of cards; empty without cards."""
    inner = "".join(cards)
    return f'<h2>{escape(title)}</h2><div class="grid">{inner}</div>' if inner else ""


def tiles(entries: Sequence[tuple[str, str, str, str]]) -> str:
    """Return the row of headline numbers from (label, value, remark, tone); tone is "", "good" or "bad"."""
    inner = "".join(
        f'<div class="tile"><span>{escape(label)}</span><strong>{escape(value)}</strong>'
        f'<em class="{tone}">{escape(remark)}</em></div>'
        for label, value, remark, tone in entries
    )
    return f'<div class="tiles">{inner}</div>'


def card(
    title: str,
    body: str,
    *,
    unit: str = "",
    value: str = "",
    legend: Sequence[tuple[str, str, str]] = (),
    note: str = "",
    wide: bool = False,
) -> str:
    """Return one card; `body` is HTML, the rest plain text. `legend` holds (label, color role, value)."""
    keys = "".join(
        f'<span class="key"><i style="background:var(--{color})"></i>{escape(label)} <b>{escape(last)}</b></span>'
        for label, color, last in legend
    )
    reading = f'<span class="value">{escape(value)}</span>' if value else ""
    small = f"<small>{escape(unit)}</small>" if unit else ""
    foot = f'<p class="note">{escape(note)}</p>' if note else ""
    kind = "card wide" if wide else "card"
    return (
        f'<section class="{kind}"><div class="head"><h3>{escape(title)} {small}</h3>'
        f'<div class="right">{keys}{reading}</div></div><div class="body">{body}</div>{foot}</section>'
    )


def format_number(value: float | None) -> str:
    """Return a number with four significant digits and thousands separators, "–" for None."""
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def placeholder(text: str) -> str:
    """Return a text shown in place of a chart."""
    return f'<p class="absent">{escape(text)}</p>'


def table(rows: Iterable[Sequence[Any]], header: Sequence[str] = (), *, numbers: bool = False) -> str:
    """Return a table whose first column is the row name. With `numbers`, only names wrap, not the cells."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th>{escape(str(name))}</th>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    kind = '<table class="numbers">' if numbers else "<table>"
    return f'<div class="scroll">{kind}{f"<tr>{head}</tr>" if head else ""}{body}</table></div>'


def preformatted(text: str) -> str:
    """Return preformatted text in a fixed-width font."""
    return f"<pre>{escape(text)}</pre>"


def collapsible(summary: str, body: str) -> str:
    """Return collapsed HTML that expands on a click."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def write(path: Path, text: str) -> Path:
    """Write `path` atomically, so that a reader never gets a partial page."""
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path
