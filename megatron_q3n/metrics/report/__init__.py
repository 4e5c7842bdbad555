"""report.html: a self-contained page of one run, or of several runs compared.

`run_files` reads a run directory, `series` prepares curves, `charts` draws them as inline SVG, `panels` defines the
charts of a run, `page` and `style` produce the HTML, and `single` and `comparison` are the two pages. All numbers come
from the files of the run; only smoothing and averaging are done here.
"""

from megatron_q3n.metrics.report.comparison import write_comparison
from megatron_q3n.metrics.report.single import write_report

__all__ = ["write_comparison", "write_report"]
