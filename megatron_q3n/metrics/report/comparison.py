"""Several runs over each other on one page: the same panels as a single report, one colour per variant, over tokens.

Runs that differ in the seed alone are one variant: a thin curve each, their mean a thick one, and in the table the mean
and the standard deviation of what they ended with.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_q3n.config import UserError
from megatron_q3n.metrics.alerts import alerts_in
from megatron_q3n.metrics.progress import clock_text
from megatron_q3n.metrics.report import page
from megatron_q3n.metrics.report.charts import NUM_COLOURS, Curve, line_chart
from megatron_q3n.metrics.report.evaluation import evaluation_comparison
from megatron_q3n.metrics.report.panels import (
    SECTIONS,
    Panel,
    curves_of,
    logged_names,
    panels_for,
    row_name,
    short,
    unit_of,
)
from megatron_q3n.metrics.report.run_files import RunFiles, load
from megatron_q3n.metrics.report.series import Series, pick, smooth
from megatron_q3n.metrics.report.single import VALIDATION, active_seconds, compact, status_text
from megatron_q3n.metrics.report.variants import Variant, group, mean_and_spread, mean_curve, settings, spread_text

# heading -> where a run ended in that respect; what no run has a number of is left out
_FINAL: dict[str, Callable[[RunFiles], float | None]] = {
    "validation, bits/byte": lambda run: pick(run.records, VALIDATION).last,
    "validation, nats/token": lambda run: pick(run.records, "loss/validation").last,
    "training, nats/token, smoothed": lambda run: smooth(pick(run.records, "loss/train")).last,
    "attention to the first token, most": lambda run: pick(run.records, "sinks/first_token_max").last,
    "largest activation over the median": lambda run: pick(run.records, "activations/max_over_median").last,
    "largest norm scale": lambda run: pick(run.records, "norms/max").last,
    "fullest expert over the mean, smoothed": lambda run: smooth(pick(run.records, "experts/max_over_mean")).last,
    "dead experts": lambda run: pick(run.records, "experts/dead").last,
    "tokens/s, median": lambda run: _median(pick(run.records, "throughput/tokens_per_second")),
    "alerts": lambda run: float(len(alerts_in(run.records, run.config))),
}


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write a page that lays the curves of several runs over each other, and return its path.

    Raises: UserError when a directory is not a run's, or there are more variants than colours.
    """
    if len(run_dirs) < 2:
        raise UserError(f"--compare takes 2 or more run directories, found {len(run_dirs)}.")
    runs = [load(run_dir) for run_dir in run_dirs]
    variants = group(runs)
    if len(variants) > NUM_COLOURS:
        raise UserError(
            f"--compare takes runs of up to {NUM_COLOURS} variants (runs that differ in more than the seed), found "
            f"{len(variants)}; compare fewer at a time."
        )
    panels = [p for p in panels_for([r for run in runs for r in run.records]) if not p.is_by_layer]
    first = [_overview(variants), _differences(variants), _single_runs(variants)]
    charts = (
        page.section(name, [_card(panel, variants) for panel in panels if panel.section == name]) for name in SECTIONS
    )
    title = f"{len(runs)} runs compared"
    subtitle = "curves over tokens" if len(variants) == len(runs) else _subtitle(variants)
    evaluated = page.section("Evaluation", evaluation_comparison(variants))
    body = [page.section("Runs", first), evaluated, *charts]
    return page.write(path, page.document(title, subtitle, body))


def _subtitle(variants: Sequence[Variant]) -> str:
    return f"{len(variants)} variants · curves over tokens: thin a seed each, thick their mean"


def _overview(variants: Sequence[Variant]) -> str:
    """Return the table of what the variants ended with, and the colours of the whole page."""
    found = {
        heading: [mean_and_spread([final(run) for run in v.runs]) for v in variants]
        for heading, final in _FINAL.items()
    }
    rows: list[tuple[object, ...]] = [
        (heading, *(spread_text(*numbers) for numbers in every))
        for heading, every in found.items()
        if any(mean is not None for mean, _ in every)
    ]
    rows.insert(0, ("runs", *(len(v.runs) for v in variants)))
    several = any(len(v.runs) > 1 for v in variants)
    note = "Mean ± standard deviation over the runs of a variant." if several else ""
    table = page.table(rows, ("", *(v.name for v in variants)), numbers=True)
    return page.card("Where they ended", table, legend=_keys(variants), note=note, wide=True)


def _differences(variants: Sequence[Variant]) -> str:
    """Return the settings in which the variants differ."""
    every = [settings(variant.runs[0]) for variant in variants]
    rows = [
        (name, *(one.get(name, "–") for one in every))
        for name in dict.fromkeys(name for one in every for name in one)
        if any(one.get(name) != every[0].get(name) for one in every)
    ]
    header = ("setting", *(variant.name for variant in variants))
    same = page.sentence("The runs have the same settings, but for the seed.")
    return page.card("Where they differ", page.table(rows, header) if rows else same, wide=True)


def _single_runs(variants: Sequence[Variant]) -> str:
    header = ("run", "variant", "bits/byte", "training loss", "steps", "tokens", "time", "")
    table = page.table((_run_row(v, run) for v in variants for run in v.runs), header)
    return page.card("Each run", page.folded("Show", table), wide=True)


def _run_row(variant: Variant, run: RunFiles) -> list[str]:
    tokens, seconds = pick(run.records, "tokens").last, active_seconds(run)
    return [
        run.name,
        variant.name,
        page.reading(_FINAL["validation, bits/byte"](run)),
        page.reading(_FINAL["training, nats/token, smoothed"](run)),
        page.reading(pick(run.records, "step").last),
        "–" if tokens is None else compact(tokens),
        "–" if seconds is None else clock_text(seconds),
        status_text(run),
    ]


def _card(panel: Panel, variants: Sequence[Variant]) -> str:
    """Return one panel; a second metric of the same run is drawn in the same colour."""
    curves = [curve for variant in variants for curve in _curves(panel, variant)]
    if not curves:
        return ""
    first = next(name for v in variants for run in v.runs for name in _shown(panel, run))
    chart = line_chart(
        sorted(curves, key=lambda curve: not curve.faint),
        title=panel.title,
        x_label="tokens",
        line_at=panel.line_at,
        line_label=panel.line_label,
        usual_range=panel.usual_range,
    )
    what = f"{panel.title}: {panel.labels[0]}" if len(panel.labels) > 1 else panel.title
    return page.card(what, chart, unit=unit_of(first), legend=_keys(variants), note=panel.note)


def _curves(panel: Panel, variant: Variant) -> Iterator[Curve]:
    by_metric: dict[str, list[Series]] = {}
    for run in variant.runs:
        for name in _shown(panel, run):
            found = curves_of(pick(run.records, name, "tokens"), short(name), variant.colour, panel.noisy)
            by_metric.setdefault(name, []).append(found[-1].series)
    for name, every in by_metric.items():
        mean = mean_curve(every)
        for series in every:
            yield Curve(series, short(name), variant.colour, faint=mean is not None)
        if mean is not None:
            yield Curve(mean, short(name), variant.colour)


def _shown(panel: Panel, run: RunFiles) -> list[str]:
    """Return the metrics of a panel to overlay: all depths of one row, else the panel's first."""
    present = logged_names(panel, run.records)
    return [name for name in present if row_name(name) == row_name(present[0])]


def _keys(variants: Sequence[Variant]) -> list[tuple[str, str, str]]:
    return [(variant.name, variant.colour, "") for variant in variants]


def _median(series: Series) -> float | None:
    return float(np.median(series.finite)) if len(series.finite) else None
