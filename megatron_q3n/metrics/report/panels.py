"""Which charts there are, in which section, and how a metric's unit and name read; for one run and for several.

A metric of the table (`metrics/names.py`) that no panel names gets a panel of its own under "More", so that a
new number is seen without a change here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_q3n.metrics import names
from megatron_q3n.metrics.jsonl import Record
from megatron_q3n.metrics.report import page
from megatron_q3n.metrics.report.charts import NUM_COLOURS, Curve, line_chart
from megatron_q3n.metrics.report.series import Series, names_in, pick, smooth

MARKED_BELOW = 60  # points; a curve of more is a line without markers
SMOOTHED_ABOVE = 12  # points; below, a curve is shown as it is


@dataclass(frozen=True)
class Panel:
    """One chart: its metrics (rows of the table), and whether a sentence takes its place when it has no numbers."""

    section: str
    title: str
    metrics: tuple[str, ...]
    noisy: bool = False  # drawn smoothed, the raw curve faint behind
    always: bool = False
    line_at: float | None = None
    line_label: str = ""
    usual_range: bool = False  # a slow first step must not flatten the rest


TFLOPS = "throughput/model_tflops_per_second"
LEARNING, EXPERTS, OPTIMIZER, SPEED, MORE = "Learning", "Experts", "Optimizer", "Speed", "More"

PANELS = (
    Panel(LEARNING, "Loss", ("loss/train", "loss/validation"), noisy=True, always=True),
    Panel(LEARNING, "Validation", ("bits_per_byte/validation",), always=True),
    Panel(LEARNING, "Multi-token prediction loss", ("loss/mtp_<k>",), noisy=True, always=True),
    Panel(LEARNING, "Drafts kept, greedy", ("acceptance/greedy_<k>",)),
    Panel(LEARNING, "Drafts kept, drawn", ("acceptance/sampled_<k>",)),
    Panel(
        LEARNING,
        "Tokens per pass of the trunk",
        ("acceptance/greedy_length", "acceptance/sampled_length"),
    ),
    Panel(LEARNING, "Expert balance loss", ("loss/balance",), True, True, 1.0, "even"),
    Panel(
        EXPERTS, "Fullest expert, worst layer", ("experts/max_over_mean",), True, False, 1.0, "even"
    ),
    Panel(EXPERTS, "Dead experts", ("experts/dead",)),
    Panel(OPTIMIZER, "Learning rate", ("learning_rate",), always=True),
    Panel(OPTIMIZER, "Gradient norm", ("grad_norm",), noisy=True, always=True),
    Panel(OPTIMIZER, "Parameter norm", ("params_norm",)),
    Panel(OPTIMIZER, "Skipped steps", ("skipped_steps",)),
    Panel(SPEED, "Throughput", ("throughput/tokens_per_second",), True, True, usual_range=True),
    Panel(SPEED, "Step time", ("throughput/step_seconds",), noisy=True, usual_range=True),
    Panel(SPEED, "Model FLOP/s", (TFLOPS,), noisy=True, usual_range=True),
    Panel(SPEED, "Model FLOPs utilisation", ("throughput/mfu",), noisy=True, usual_range=True),
    Panel(SPEED, "Peak memory", ("memory/peak_gib",)),
)
_AXES = {names.STEP, names.TOKENS, names.TIME}


def panels_for(records: Sequence[Record]) -> list[Panel]:
    """Return the panels of a run: the fixed list, and one for each further metric it logged."""
    covered = {row for panel in PANELS for row in panel.metrics} | _AXES
    extra = [name for name in names_in(records) if row_name(name) not in covered]
    return [*PANELS, *(Panel(MORE, name, (name,)) for name in sorted(extra))]


def row_name(name: str) -> str:
    """Return the table's spelling of a metric: "loss/mtp_<k>" for "loss/mtp_2"; an unknown name is its own."""
    metric = names.find(name)
    return metric.name if metric else name


def logged_names(panel: Panel, records: Sequence[Record]) -> list[str]:
    """Return the metric names of a panel that a run logged, in the panel's order."""
    present = names_in(records)
    return [name for row in panel.metrics for name in present if row in (name, row_name(name))]


def panel_card(
    panel: Panel,
    records: Sequence[Record],
    *,
    line_at: float | None = None,
    line_label: str = "",
) -> str:
    """Return the card of one panel for one run; empty when it has nothing. `line_at` overrides the panel's."""
    present = [name for name in logged_names(panel, records) if _says_something(name, records)]
    if not present:
        return page.card(panel.title, page.sentence(_absent(panel))) if panel.always else ""
    curves: list[Curve] = []
    for index, name in enumerate(present):
        curves += curves_of(
            pick(records, name), short(name), f"c{index % NUM_COLOURS}", panel.noisy
        )
    clear = [curve for curve in curves if not curve.faint]
    chart = line_chart(
        sorted(curves, key=lambda curve: not curve.faint),
        title=panel.title,
        line_at=panel.line_at if line_at is None else line_at,
        line_label=line_label or panel.line_label,
        usual_range=panel.usual_range,
    )
    several = len(clear) > 1
    return page.card(
        panel.title,
        chart,
        unit=unit_of(present[0]),
        value="" if several else reading(clear[0].series.last),
        legend=[(c.label, c.colour, reading(c.series.last)) for c in clear] if several else [],
        note=_lost(curves),
    )


def curves_of(series: Series, label: str, colour: str, noisy: bool) -> list[Curve]:
    """Return the curves of one metric: itself, or faint behind its moving average; validations are few and stay."""
    if noisy and len(series) > SMOOTHED_ABOVE and label != "validation":
        return [Curve(series, label, colour, faint=True), Curve(smooth(series), label, colour)]
    return [Curve(series, label, colour, markers=len(series) < MARKED_BELOW)]


def unit_of(name: str) -> str:
    """Return the unit for people; a pure number has none."""
    metric = names.find(name)
    return "" if metric is None or metric.unit == "1" else metric.unit


def short(name: str) -> str:
    """Return a legend entry: "train" for "loss/train", "depth 2" for "loss/mtp_2"."""
    return re.sub(r"^mtp_(\d+)$", r"depth \1", name.rsplit("/", 1)[-1]).replace("_", " ")


def reading(value: float | None) -> str:
    """Return a number as the page shows it: four digits that matter, thousands marked."""
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _says_something(name: str, records: Sequence[Record]) -> bool:
    """A count of mishaps that stayed zero needs no chart."""
    return name != "skipped_steps" or any(record.get(name) for record in records)


def _absent(panel: Panel) -> str:
    return f"This run logged no {' or '.join(panel.metrics)}."


def _lost(curves: Sequence[Curve]) -> str:
    lost = max(curve.series.num_not_finite for curve in curves)
    return (
        f"{lost:,} {'value was' if lost == 1 else 'values were'} not finite (marked on the axis)"
        if lost
        else ""
    )
