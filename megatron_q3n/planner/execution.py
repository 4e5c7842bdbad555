"""Execution plan in a dry run: which path each part takes on a GPU, and why not a faster one."""

from rich import box
from rich.table import Table

from megatron_q3n.config import RunConfig
from megatron_q3n.config.execution_rules import assumed_hardware, execution_plan


def execution_table(config: RunConfig) -> Table:
    """Return the plan as a table, one row per decision; slow paths are marked."""
    hardware = assumed_hardware(config)
    table = Table(
        title=f"Execution plan, assuming a GPU ({hardware.backend}) on which every kernel passes its check",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in ("kind", "part", "path (why not a faster one)"):
        table.add_column(name)
    previous = ""
    for kind, part, decision in execution_plan(config, hardware).rows():
        style = "" if decision else "yellow"
        table.add_row("" if kind == previous else kind, part, str(decision), style=style)
        previous = kind
    return table
