"""Mode `layouts` of tools/benchmarks/bench.py: whole steps in every parallel layout, under torchrun, beside one GPU.

Rows of one number of GPUs share one start, since importing and qualifying kernels takes longer than their steps.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from tools.benchmarks.comparison.layout_rows import Row

WORKER = "tools.benchmarks.comparison.layout_worker"


def measure(rows: list[Row], steps: int, seconds: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure the rows, those of one GPU first. Returns: the figures of each row; of the slowest rank."""
    figures: dict[str, Any] = {}
    for processes in sorted({row.processes for row in rows}):
        names = ",".join(row.name for row in rows if row.processes == processes)
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            try:
                subprocess.run([*command, "-m", WORKER, names, str(results), str(steps)], timeout=seconds, check=False)
            except subprocess.TimeoutExpired:
                report(f"{processes} processes: not finished after {seconds} s")
            ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("results.json.*"))]
        for name in names.split(","):
            found = [rank[name] for rank in ranks if name in rank]
            failed = [rank for rank in found if "failure" in rank]
            if failed or len(found) < processes:
                figures[name] = failed[0] if failed else {"failure": "not finished"}
            else:
                figures[name] = max(found, key=lambda rank: rank["milliseconds"])
    return figures


def table_of(rows: list[Row], figures: dict[str, Any]) -> Table:
    """Return the table: a row per layout, with its rate relative to the row that it is compared with."""
    table = Table()
    for name in ("", "GPUs", "ms", "tokens/s", "× against", "TFLOP/s/GPU", "MFU", "peak GiB", "graph", "last loss"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows:
        found = figures[row.name]
        if "failure" in found:
            table.add_row(row.name, str(row.processes), found["failure"][:60])
            continue
        other = figures.get(f"{row.group}:{row.against}".replace(" ", "-"), {})
        rate = found["tokens_per_second"] / other["tokens_per_second"] if "tokens_per_second" in other else None
        table.add_row(
            row.name,
            str(row.processes),
            f"{found['milliseconds']:,.1f}",
            f"{found['tokens_per_second']:,.0f}",
            f"{rate:.2f} {row.against}" if rate else "",
            f"{found['tflops_per_second']:.0f}",
            f"{found['mfu']:.1%}",
            f"{found['peak_gib']:.1f}",
            "yes" if found["graph"] else "no",
            f"{found['losses'][-1]:.4f}",
        )
    return table
