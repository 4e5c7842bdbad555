"""Tables of the figures: one row per contestant on a wide terminal, one column per contestant on a narrow one."""

from typing import Any

from rich.console import Console
from rich.table import Table

# columns that the table of a comparison needs
WIDE = 160
# width of the output in a pipe or log
PIPE_WIDTH = 162
Row = dict[str, Any]
COLUMNS = (
    ("contestant", "contestant", "{}"),
    ("ms", "milliseconds", "{:,.2f}"),
    ("rounds", "milliseconds_by_round", "{0[0]:.1f}–{0[1]:.1f}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("× first", "first_is_times_faster", "{:.2f}"),
    ("× 1st case", "rate_of_first_case", "{:.2f}"),
    ("TFLOP/s", "tflops_per_second", "{:,.4g}"),
    ("MFU", "mfu", "{:.1%}"),
    ("weights ms", "renewing_milliseconds", "{:.2f}"),
    ("peak GiB", "peak_gib", "{:.1f}"),
    ("period GiB", "period_gib", "{:.1f}"),
    ("busy ms", "busy_ms", "{:,.1f}"),
    ("gap ms", "gap_ms", "{:,.1f}"),
    ("kernels", "kernels", "{:,.0f}"),
    ("launches", "launches", "{:,.0f}"),
    ("start s", "first_step_seconds", "{:.0f}"),
)


def console() -> Console:
    """Return the console: with the width of the terminal, or a fixed one in a pipe."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(width=PIPE_WIDTH, highlight=False)


def show_comparison(rows: list[Row], to: Console) -> None:
    """Print all rows, and the kernel groups of profiled ones."""
    used = [c for c in COLUMNS if any(row.get(c[1]) is not None for row in rows)]
    if len({row["case"] for row in rows}) == 1:
        used = [c for c in used if c[1] != "rate_of_first_case"]
    for case in dict.fromkeys(row["case"] for row in rows):
        part = [row for row in rows if row["case"] == case]
        to.print(f"[bold]{case}[/bold]")
        (_show_wide if to.width >= WIDE else _show_narrow)(part, used, to)
    if any("groups_ms" in row for row in rows):
        _show_groups(rows, to)
    if any(row.get("renewing_milliseconds") for row in rows):
        to.print(
            "weights ms: quantizing a period's expert weights, once per step beside the optimizer, independent of the "
            "number of micro-batches; not included in ms and tokens/s. Where the column is empty, it is included."
        )
    for row in rows:
        if row.get("doubt"):
            text = f"DOUBTFUL: {row['case']}, {row['contestant']}: {row['doubt']}"
            to.print(text, style="bold red", markup=False)
        if row["failure"]:
            to.print(f"{row['case']}, {row['contestant']}: {row['failure']}", markup=False)


def show_figures(figures: dict[str, Any], to: Console) -> None:
    """Print pairs of name and value; nested ones below their heading."""
    table = Table(show_header=False, box=None)
    for name, value in figures.items():
        if isinstance(value, dict):
            table.add_row(name.replace("_", " "), "")
            for inner, number in value.items():
                table.add_row(f"  {inner}".replace("_", " "), _plain(number))
        elif not isinstance(value, list):
            table.add_row(name.replace("_", " "), _plain(value))
    to.print(table)


def _show_wide(rows: list[Row], columns: Any, to: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for title, name, _ in columns:
        table.add_column(title, justify="left" if name == "contestant" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row, name, form) for _, name, form in columns))
    to.print(table)


def _show_narrow(rows: list[Row], columns: Any, to: Console) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for title, name, form in columns:
        table.add_row(title, *(_cell(row, name, form) for row in rows))
    to.print(table)


def _show_groups(rows: list[Row], to: Console) -> None:
    """Print milliseconds by kernel group, a column for each profiled row."""
    profiled = [row for row in rows if "groups_ms" in row]
    several = len({row["case"] for row in profiled}) > 1
    table = Table(box=None, pad_edge=False, title="kernel milliseconds", title_justify="left")
    table.add_column("group", no_wrap=True)
    for row in profiled:
        case = f"\n{row['tokens']:,}/{row['sequence_length']:,}/{row['experts']}" if several else ""
        table.add_column(row["contestant"] + case, justify="right")
    for group in profiled[0]["groups_ms"]:
        if any(row["groups_ms"][group] for row in profiled):
            table.add_row(group, *(f"{row['groups_ms'][group]:,.2f}" for row in profiled))
    to.print(table)


def _cell(row: Row, name: str, form: str) -> str:
    value = row.get(name)
    return "–" if value is None else form.format(value)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return "–" if value is None else str(value)
