"""Panels of the report: charts by section, with units and labels; used for one run and for comparisons.

A metric of the table (`metrics/names.py`) without a panel here gets its own panel in the section "More". Per-layer
metrics are drawn as curves if there are few layers, and as a heat map of layers over steps otherwise.
`metrics/workspace.py` builds the same panels for wandb.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_q3n.metrics import names
from megatron_q3n.metrics.jsonl import Record
from megatron_q3n.metrics.report import page
from megatron_q3n.metrics.report.charts import NUM_COLORS, Curve, layer_map, line_chart
from megatron_q3n.metrics.report.series import Series, names_in, pick, smooth

# curves with fewer points have markers
MARKERS_BELOW_POINTS = 60
# curves with at most this many points are not smoothed
SMOOTH_ABOVE_POINTS = 12


@dataclass(frozen=True)
class Panel:
    """One chart of one or more metrics (rows of the table).

    smoothed: draw the moving average, with the raw curve faint behind it
    show_if_empty: show a text if the run logged none of the metrics
    line_at, line_label: a dashed reference line
    clip_outliers: limit the y axis to the usual range, so that a slow first step does not flatten the rest
    labels: legend entries of the metrics
    """

    section: str
    title: str
    metrics: tuple[str, ...]
    smoothed: bool = False
    show_if_empty: bool = False
    line_at: float | None = None
    line_label: str = ""
    clip_outliers: bool = False
    labels: tuple[str, ...] = ()
    note: str = ""

    @property
    def is_by_layer(self) -> bool:
        """Whether the panel shows a per-layer metric."""
        return self.metrics[0].endswith("layer_<k>")


TFLOPS = "throughput/model_tflops_per_second"
LEARNING, EXPERTS, ATTENTION = "Loss", "MoE experts and router", "Attention and activations"
DELTA, OPTIMIZER, THROUGHPUT, MORE = "Gated DeltaNet", "Optimizer and norms", "Throughput and memory", "More"
SECTIONS = (LEARNING, EXPERTS, ATTENTION, DELTA, OPTIMIZER, THROUGHPUT, MORE)

PANELS = (
    Panel(LEARNING, "Loss", ("loss/train", "loss/validation"), smoothed=True, show_if_empty=True),
    Panel(LEARNING, "Validation loss by source", ("loss/validation/<source>",)),
    Panel(LEARNING, "Validation bits per byte", ("bits_per_byte/validation",), show_if_empty=True),
    Panel(LEARNING, "Multi-token prediction loss", ("loss/mtp_<k>",), smoothed=True, show_if_empty=True),
    Panel(LEARNING, "Draft acceptance rate, greedy", ("acceptance_rate/greedy_<k>",)),
    Panel(LEARNING, "Draft acceptance rate, sampled", ("acceptance_rate/sampled_<k>",)),
    Panel(
        LEARNING,
        "Acceptance length",
        ("acceptance_length/greedy", "acceptance_length/sampled"),
        note="Tokens per forward pass of the trunk: 1 plus the accepted drafts.",
    ),
    Panel(LEARNING, "Load balancing loss", ("loss/load_balancing",), True, True, 1.0, "balanced"),
    Panel(
        EXPERTS,
        "Expert load imbalance, worst layer",
        ("experts/load_imbalance",),
        smoothed=True,
        line_at=1.0,
        line_label="balanced",
        note="Tokens of the most loaded expert over the layer's mean.",
    ),
    Panel(EXPERTS, "Dead experts", ("experts/dead",)),
    Panel(
        EXPERTS,
        "Expert load imbalance by layer",
        ("experts/load_imbalance_layer_<k>", "experts/load_imbalance_mtp"),
        line_at=1.0,
        line_label="balanced",
    ),
    Panel(EXPERTS, "Dead experts by layer", ("experts/dead_layer_<k>", "experts/dead_mtp")),
    Panel(
        EXPERTS,
        "Router entropy",
        ("router/entropy", "router/entropy_min"),
        labels=("mean of layers", "minimum"),
        note="Entropy of the softmax over all experts, divided by ln(num_experts): 1 is uniform.",
    ),
    Panel(EXPERTS, "Router entropy by layer", ("router/entropy_layer_<k>", "router/entropy_mtp")),
    Panel(
        ATTENTION,
        "Attention weight on the first token",
        ("attention/first_token_share", "attention/first_token_share_max"),
        labels=("mean of layers", "maximum"),
        note="Attention sink: mean over later queries; uniform attention over T tokens gives about ln(T)/T.",
    ),
    Panel(
        ATTENTION,
        "Attention weight on the first token by layer",
        ("attention/first_token_share_layer_<k>", "attention/first_token_share_mtp"),
    ),
    Panel(
        ATTENTION,
        "Largest activation over the median",
        ("activations/max_over_median",),
        note="Residual stream, worst layer; massive activations exceed 1,000 (arXiv 2402.17762).",
    ),
    Panel(
        ATTENTION,
        "Largest activation over the median by layer",
        ("activations/max_over_median_layer_<k>", "activations/max_over_median_mtp"),
    ),
    Panel(ATTENTION, "Largest activation", ("activations/max",)),
    Panel(ATTENTION, "Largest activation by layer", ("activations/max_layer_<k>", "activations/max_mtp")),
    Panel(ATTENTION, "Residual stream RMS by layer", ("activations/rms_layer_<k>", "activations/rms_mtp")),
    Panel(
        DELTA,
        "Half-life of the state",
        ("gated_delta/half_life_tokens", "gated_delta/half_life_tokens_min", "gated_delta/half_life_tokens_max"),
        labels=("median head", "minimum", "maximum"),
        note="Tokens until a head's state decays to half, from its mean decay.",
    ),
    Panel(DELTA, "Half-life of the state by layer, median head", ("gated_delta/half_life_tokens_layer_<k>",)),
    Panel(
        DELTA,
        "State norm",
        ("gated_delta/state_norm",),
        note="Frobenius norm at the end of a sequence, mean over heads.",
    ),
    Panel(DELTA, "State norm by layer", ("gated_delta/state_norm_layer_<k>",)),
    Panel(OPTIMIZER, "Learning rate", ("learning_rate",), show_if_empty=True),
    Panel(OPTIMIZER, "Gradient norm", ("grad_norm",), smoothed=True, show_if_empty=True),
    Panel(OPTIMIZER, "Gradient norm by layer", ("gradients/norm_layer_<k>",)),
    Panel(
        OPTIMIZER,
        "Gradient norm outside the layers",
        ("gradients/norm_embedding", "gradients/norm_head", "gradients/norm_mtp"),
        labels=("embedding", "head", "MTP"),
    ),
    Panel(
        OPTIMIZER,
        "Largest norm scale",
        ("norm_scale/max", *(f"norm_scale/max_{kind}" for kind in names.NORM_KINDS)),
        labels=("all norms", *(kind.replace("_", " ") for kind in names.NORM_KINDS)),
        line_at=1.0,
        line_label="initial",
        note="Largest magnitude of 1 + weight.",
    ),
    Panel(OPTIMIZER, "Largest norm scale by layer", ("norm_scale/max_layer_<k>",), line_at=1.0, line_label="initial"),
    Panel(OPTIMIZER, "Parameter norm", ("params_norm",)),
    Panel(OPTIMIZER, "Skipped and repeated steps", ("skipped_steps", "repeated_steps")),
    Panel(THROUGHPUT, "Throughput", ("throughput/tokens_per_second",), True, True, clip_outliers=True),
    Panel(THROUGHPUT, "Step time", ("throughput/step_seconds",), smoothed=True, clip_outliers=True),
    Panel(THROUGHPUT, "Model FLOP/s", (TFLOPS,), smoothed=True, clip_outliers=True),
    Panel(
        THROUGHPUT,
        "Model FLOPs utilization (MFU)",
        ("throughput/mfu",),
        smoothed=True,
        clip_outliers=True,
        note="Tokens/s × FLOPs per token, forward and backward, over devices × measured bf16 matmul rate.",
    ),
    Panel(THROUGHPUT, "Time of an instruments pass", ("throughput/instruments_seconds",)),
    Panel(THROUGHPUT, "Peak memory", ("memory/peak_gib",)),
)
_AXIS_METRICS = {names.STEP, names.TOKENS, names.TIME}


def panels_for(records: Sequence[Record]) -> list[Panel]:
    """Return the panels of a run: the fixed list, and one for each other metric it logged."""
    covered = {row for panel in PANELS for row in panel.metrics} | _AXIS_METRICS
    extra = [name for name in names_in(records) if row_name(name) not in covered]
    return [*PANELS, *(Panel(MORE, name, (name,)) for name in sorted(extra))]


def row_name(name: str) -> str:
    """Return the table name of a metric ("loss/mtp_<k>" for "loss/mtp_2"), or `name` if it is not in the table."""
    metric = names.find(name)
    return metric.name if metric else name


def logged_metrics(panel: Panel, records: Sequence[Record]) -> list[str]:
    """Return the metric names of a panel that a run logged, in the panel's order."""
    present = names_in(records)
    return [name for row in panel.metrics for name in present if row in (name, row_name(name))]


def panel_card(panel: Panel, records: Sequence[Record], *, line_at: float | None = None, line_label: str = "") -> str:
    """Return the card of one panel for one run, empty without data. `line_at` overrides the panel's."""
    present = [name for name in logged_metrics(panel, records) if _is_informative(name, records)]
    # with one layer, the per-layer panel repeats the panel over all layers
    if not present or (panel.is_by_layer and len(present) == 1):
        return page.card(panel.title, page.placeholder(_missing_text(panel))) if panel.show_if_empty else ""
    if panel.is_by_layer and len(present) > NUM_COLORS:
        return _layer_map_card(panel, present, records)
    curves: list[Curve] = []
    for index, name in enumerate(present):
        color = f"c{index % NUM_COLORS}"
        curves += curves_of(pick(records, name), label_of(name, panel), color, panel.smoothed)
    clear = [curve for curve in curves if not curve.faint]
    chart = line_chart(
        sorted(curves, key=lambda curve: not curve.faint),
        title=panel.title,
        line_at=panel.line_at if line_at is None else line_at,
        line_label=line_label or panel.line_label,
        clip_outliers=panel.clip_outliers,
    )
    several = len(clear) > 1
    return page.card(
        panel.title,
        chart,
        unit=unit_of(present[0]),
        value="" if several else page.format_number(clear[0].series.last),
        legend=[(c.label, c.color, page.format_number(c.series.last)) for c in clear] if several else [],
        note=_non_finite_note(curves) or panel.note,
    )


def _layer_map_card(panel: Panel, present: Sequence[str], records: Sequence[Record]) -> str:
    """Return the card of a per-layer panel with many layers: a heat map over steps, and the range of last values."""
    all_series = [pick(records, name) for name in present]
    steps = sorted({float(x) for series in all_series for x in series.x})
    table = np.full((len(present), len(steps)), np.nan)
    for row, series in enumerate(all_series):
        table[row, np.searchsorted(steps, series.x)] = series.y
    last = [series.last for series in all_series if series.last is not None]
    span = f"{page.format_number(min(last))} … {page.format_number(max(last))}" if last else ""
    rows = [label_of(name, panel).removeprefix("layer ") for name in present]
    chart = layer_map(table, steps, rows, title=panel.title)
    return page.card(panel.title, chart, unit=unit_of(present[0]), value=span, note=panel.note)


def label_of(name: str, panel: Panel) -> str:
    """Return a metric's legend entry in this panel."""
    row = row_name(name)
    if panel.labels:
        return panel.labels[panel.metrics.index(row)]
    return short_label(name)


def curves_of(series: Series, label: str, color: str, smoothed: bool) -> list[Curve]:
    """Return the curves of one metric: the raw curve, or its moving average with the raw curve faint behind it.

    Validation values are few and never smoothed.
    """
    if smoothed and len(series) > SMOOTH_ABOVE_POINTS and label != "validation":
        return [Curve(series, label, color, faint=True), Curve(smooth(series), label, color)]
    return [Curve(series, label, color, markers=len(series) < MARKERS_BELOW_POINTS)]


def unit_of(name: str) -> str:
    """Return the unit to display, empty for dimensionless metrics."""
    metric = names.find(name)
    return "" if metric is None or metric.unit == "1" else metric.unit


def short_label(name: str) -> str:
    """Return a legend entry: "train" for "loss/train", "depth 2" for "loss/mtp_2", "layer 3" for ".../max_layer_3"."""
    if suffix := re.search(r"_(layer_\d+|mtp)$", name):
        return suffix[1].replace("layer_", "layer ").replace("mtp", "MTP")
    return re.sub(r"^mtp_(\d+)$", r"depth \1", name.rsplit("/", 1)[-1]).replace("_", " ")


def _is_informative(name: str, records: Sequence[Record]) -> bool:
    """Return whether a metric is worth a chart: counts of skipped and repeated steps are not while they are zero."""
    return name not in ("skipped_steps", "repeated_steps") or any(record.get(name) for record in records)


def _missing_text(panel: Panel) -> str:
    return f"This run logged no {' or '.join(panel.metrics)}."


def _non_finite_note(curves: Sequence[Curve]) -> str:
    count = max(curve.series.num_not_finite for curve in curves)
    return (
        f"{count:,} {'value was' if count == 1 else 'values were'} not finite (marked on the x axis)" if count else ""
    )
