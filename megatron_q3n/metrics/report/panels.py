"""Which charts there are, in which section, and how a metric's unit and name read; for one run and for several.

A metric of the table (`metrics/names.py`) that no panel names gets a panel of its own under "More", so that a
new number is seen without a change here. Numbers of every layer are curves where there are few layers, and a map of
layers over steps where there are many. `metrics/workspace.py` makes the same panels for wandb.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_q3n.metrics import names
from megatron_q3n.metrics.jsonl import Record
from megatron_q3n.metrics.report import page
from megatron_q3n.metrics.report.charts import NUM_COLOURS, Curve, layer_map, line_chart
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
    labels: tuple[str, ...] = ()  # of the metrics, in the legend
    note: str = ""

    @property
    def is_by_layer(self) -> bool:
        """Whether it shows one number of every layer."""
        return self.metrics[0].endswith("layer_<k>")


TFLOPS = "throughput/model_tflops_per_second"
LEARNING, EXPERTS, ATTENTION = "Learning", "Experts", "Attention and activations"
DELTA, OPTIMIZER, SPEED, MORE = "Gated DeltaNet", "Optimizer and norms", "Speed", "More"
SECTIONS = (LEARNING, EXPERTS, ATTENTION, DELTA, OPTIMIZER, SPEED, MORE)

PANELS = (
    Panel(LEARNING, "Loss", ("loss/train", "loss/validation"), noisy=True, always=True),
    Panel(LEARNING, "Validation", ("bits_per_byte/validation",), always=True),
    Panel(LEARNING, "Multi-token prediction loss", ("loss/mtp_<k>",), noisy=True, always=True),
    Panel(LEARNING, "Drafts kept, greedy", ("acceptance/greedy_<k>",)),
    Panel(LEARNING, "Drafts kept, drawn", ("acceptance/sampled_<k>",)),
    Panel(LEARNING, "Tokens per pass of the trunk", ("acceptance/greedy_length", "acceptance/sampled_length")),
    Panel(LEARNING, "Expert balance loss", ("loss/balance",), True, True, 1.0, "even"),
    Panel(EXPERTS, "Fullest expert, worst layer", ("experts/max_over_mean",), True, False, 1.0, "even"),
    Panel(EXPERTS, "Dead experts", ("experts/dead",)),
    Panel(
        EXPERTS,
        "Fullest expert by layer",
        ("experts/max_over_mean_layer_<k>", "experts/max_over_mean_mtp"),
        line_at=1.0,
        line_label="even",
    ),
    Panel(EXPERTS, "Dead experts by layer", ("experts/dead_layer_<k>", "experts/dead_mtp")),
    Panel(
        EXPERTS,
        "Router entropy",
        ("router/entropy", "router/entropy_min"),
        labels=("mean of layers", "least"),
        note="Of the softmax over all experts, over ln of their number: 1 is no preference.",
    ),
    Panel(EXPERTS, "Router entropy by layer", ("router/entropy_layer_<k>", "router/entropy_mtp")),
    Panel(
        ATTENTION,
        "Attention to the first token",
        ("sinks/first_token", "sinks/first_token_max"),
        labels=("mean of layers", "most"),
        note="Share of what later tokens attend to; an even spread over T tokens is about ln(T)/T.",
    ),
    Panel(ATTENTION, "Attention to the first token by layer", ("sinks/first_token_layer_<k>", "sinks/first_token_mtp")),
    Panel(
        ATTENTION,
        "Largest activation over the median",
        ("activations/max_over_median",),
        note="Of the residual stream, worst layer; 1,000 and more are called massive.",
    ),
    Panel(
        ATTENTION,
        "Largest activation over the median by layer",
        ("activations/max_over_median_layer_<k>", "activations/max_over_median_mtp"),
    ),
    Panel(ATTENTION, "Largest activation", ("activations/max",)),
    Panel(ATTENTION, "Largest activation by layer", ("activations/max_layer_<k>", "activations/max_mtp")),
    Panel(
        ATTENTION, "Residual stream by layer, root mean square", ("activations/rms_layer_<k>", "activations/rms_mtp")
    ),
    Panel(
        DELTA,
        "Half-life of memory",
        ("delta/half_life", "delta/half_life_min", "delta/half_life_max"),
        labels=("median head", "shortest", "longest"),
        note="Tokens until a head's state has faded to half, by its mean decay.",
    ),
    Panel(DELTA, "Half-life by layer, median head", ("delta/half_life_layer_<k>",)),
    Panel(DELTA, "State norm", ("delta/state_norm",), note="Frobenius norm at the end of a sequence, mean over heads."),
    Panel(DELTA, "State norm by layer", ("delta/state_norm_layer_<k>",)),
    Panel(OPTIMIZER, "Learning rate", ("learning_rate",), always=True),
    Panel(OPTIMIZER, "Gradient norm", ("grad_norm",), noisy=True, always=True),
    Panel(OPTIMIZER, "Gradient norm by layer", ("gradients/norm_layer_<k>",)),
    Panel(
        OPTIMIZER,
        "Gradient norm elsewhere",
        ("gradients/norm_embedding", "gradients/norm_head", "gradients/norm_mtp"),
        labels=("embedding", "head", "MTP"),
    ),
    Panel(
        OPTIMIZER,
        "Largest norm scale",
        ("norms/max", *(f"norms/max_{kind}" for kind in names.NORM_KINDS)),
        labels=("any", *(kind.replace("_", " ") for kind in names.NORM_KINDS)),
        line_at=1.0,
        line_label="at the start",
        note="1 + weight, in magnitude.",
    ),
    Panel(OPTIMIZER, "Largest norm scale by layer", ("norms/max_layer_<k>",), line_at=1.0, line_label="at the start"),
    Panel(OPTIMIZER, "Parameter norm", ("params_norm",)),
    Panel(OPTIMIZER, "Skipped steps", ("skipped_steps",)),
    Panel(SPEED, "Throughput", ("throughput/tokens_per_second",), True, True, usual_range=True),
    Panel(SPEED, "Step time", ("throughput/step_seconds",), noisy=True, usual_range=True),
    Panel(SPEED, "Model FLOP/s", (TFLOPS,), noisy=True, usual_range=True),
    Panel(
        SPEED,
        "Model FLOPs utilisation",
        ("throughput/mfu",),
        noisy=True,
        usual_range=True,
        note="Tokens/s × FLOPs per token, forward and backward, over devices × the measured bf16 matrix rate.",
    ),
    Panel(SPEED, "A look inside the model", ("throughput/instruments_seconds",)),
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


def panel_card(panel: Panel, records: Sequence[Record], *, line_at: float | None = None, line_label: str = "") -> str:
    """Return the card of one panel for one run; empty when it has nothing. `line_at` overrides the panel's."""
    present = [name for name in logged_names(panel, records) if _says_something(name, records)]
    if not present or (panel.is_by_layer and len(present) == 1):  # one layer is the whole already
        return page.card(panel.title, page.sentence(_absent(panel))) if panel.always else ""
    if panel.is_by_layer and len(present) > NUM_COLOURS:
        return _map_card(panel, present, records)
    curves: list[Curve] = []
    for index, name in enumerate(present):
        colour = f"c{index % NUM_COLOURS}"
        curves += curves_of(pick(records, name), label_of(name, panel), colour, panel.noisy)
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
        value="" if several else page.reading(clear[0].series.last),
        legend=[(c.label, c.colour, page.reading(c.series.last)) for c in clear] if several else [],
        note=_lost(curves) or panel.note,
    )


def _map_card(panel: Panel, present: Sequence[str], records: Sequence[Record]) -> str:
    """Return the card of a panel of many layers: layers over steps, the last numbers' range in words."""
    every = [pick(records, name) for name in present]
    steps = sorted({float(x) for series in every for x in series.x})
    table = np.full((len(present), len(steps)), np.nan)
    for row, series in enumerate(every):
        table[row, np.searchsorted(steps, series.x)] = series.y
    last = [series.last for series in every if series.last is not None]
    span = f"{page.reading(min(last))} … {page.reading(max(last))}" if last else ""
    rows = [label_of(name, panel).removeprefix("layer ") for name in present]
    chart = layer_map(table, steps, rows, title=panel.title)
    return page.card(panel.title, chart, unit=unit_of(present[0]), value=span, note=panel.note)


def label_of(name: str, panel: Panel) -> str:
    """Return a metric's legend entry in this panel."""
    row = row_name(name)
    if panel.labels:
        return panel.labels[panel.metrics.index(row)]
    return short(name)


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
    """Return a legend entry: "train" for "loss/train", "depth 2" for "loss/mtp_2", "layer 3" for ".../max_layer_3"."""
    if place := re.search(r"_(layer_\d+|mtp)$", name):
        return place[1].replace("layer_", "layer ").replace("mtp", "MTP")
    return re.sub(r"^mtp_(\d+)$", r"depth \1", name.rsplit("/", 1)[-1]).replace("_", " ")


def _says_something(name: str, records: Sequence[Record]) -> bool:
    """A count of mishaps that stayed zero needs no chart."""
    return name != "skipped_steps" or any(record.get(name) for record in records)


def _absent(panel: Panel) -> str:
    return f"This run logged no {' or '.join(panel.metrics)}."


def _lost(curves: Sequence[Curve]) -> str:
    lost = max(curve.series.num_not_finite for curve in curves)
    return f"{lost:,} {'value was' if lost == 1 else 'values were'} not finite (marked on the axis)" if lost else ""
