"""report.html: one run, or several side by side, as a page that needs no network and no other file.

`run_files` reads a run directory, `series` prepares curves, `charts` draws them as inline SVG, `panels` decides
what a run shows, `page` and `style` make the HTML, `single` and `comparison` are the two pages. No numbers are
made here: what the page shows was written by the run.
"""

from megatron_q3n.metrics.report.comparison import write_comparison
from megatron_q3n.metrics.report.single import write_report

__all__ = ["write_comparison", "write_report"]
