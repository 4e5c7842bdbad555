"""Comparison page of several runs: the panels of the single report, one color per variant, tokens as the x axis.

Runs that differ only in the seed are one variant: a thin curve per run and a thick curve for their mean. The table
shows mean and standard deviation of the final values.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_q3n.config import UserError
from megatron_q3n.metrics.alerts import alerts_in
from megatron_q3n.metrics.progress import clock_text
from megatron_q3n.metrics.report import page
from megatron_q3n.metrics.report.charts import NUM_COLORS, Curve, line_chart
from megatron_q3n.metrics.report.evaluation import evaluation_comparison
from megatron_q3n.metrics.report.panels import (
    SECTIONS,
    Panel,
    curves_of,
    logged_metrics,
    panels_for,
    row_name,
    short_label,
    unit_of,
)
from megatron_q3n.metrics.report.run_files import RunFiles, load
from megatron_q3n.metrics.report.series import Series, pick, smooth
from megatron_q3n.metrics.report.single import VALIDATION, active_seconds, compact, status_text
from megatron_q3n.metrics.report.variants import Variant, group, mean_and_spread, mean_curve, settings, spread_text

# heading -> final value of a run; rows without any value are left out
_FINAL: dict[str, Callable[[RunFiles], float | None]] = {
    "validation, bits/byte": lambda run: pick(run.records, VALIDATION).last,
    "validation, nats/token": lambda run: pick(run.records, "loss/validation").last,
    "training, nats/token, smoothed": lambda run: smooth(pick(run.records, "loss/train")).last,
    "attention weight on the first token, maximum": lambda run: (
        pick(run.records, "attention/first_token_share_max").last
    ),
    "largest activation over the median": lambda run: pick(run.records, "activations/max_over_median").last,
    "largest norm scale": lambda run: pick(run.records, "norm_scale/max").last,
    "expert load imbalance, smoothed": lambda run: smooth(pick(run.records, "experts/load_imbalance")).last,
    "dead experts": lambda run: pick(run.records, "experts/dead").last,
    "tokens/s, median": lambda run: _median(pick(run.records, "throughput/tokens_per_second")),
    "alerts": lambda run: float(len(alerts_in(run.records, run.config))),
}


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write a page with the overlaid curves of several runs, and return its path.

    Raises: UserError if a directory is not a run directory, or there are more variants than colors.
    """
    if len(run_dirs) < 2:
        raise UserError(f"--compare takes 2 or more run directories, found {len(run_dirs)}.")
    runs = [load(run_dir) for run_dir in run_dirs]
    variants = group(runs)
    if len(variants) > NUM_COLORS:
        raise UserError(
            f"--compare takes runs of up to {NUM_COLORS} variants (runs that differ in more than the seed), found "
            f"{len(variants)}; compare fewer at a time."
        )
    panels = [p for p in panels_for([r for run in runs for r in run.records]) if not p.is_by_layer]
    overview = [_overview(variants), _differences(variants), _single_runs(variants)]
    charts = (
        page.section(name, [_card(panel, variants) for panel in panels if panel.section == name]) for name in SECTIONS
    )
    title = f"{len(runs)} runs compared"
    subtitle = "curves over tokens" if len(variants) == len(runs) else _subtitle(variants)
    evaluated = page.section("Evaluation", evaluation_comparison(variants))
    body = [page.section("Runs", overview), evaluated, *charts]
    return page.write(path, page.document(title, subtitle, body))


def _subtitle(variants: Sequence[Variant]) -> str:
    return f"{len(variants)} variants · curves over tokens: thin curves are single seeds, thick curves their mean"


def _overview(variants: Sequence[Variant]) -> str:
    """Return the table of final values by variant, with the color legend of the page."""
    final_values = {
        heading: [mean_and_spread([final(run) for run in v.runs]) for v in variants]
        for heading, final in _FINAL.items()
    }
    rows: list[tuple[object, ...]] = [
        (heading, *(spread_text(*numbers) for numbers in row))
        for heading, row in final_values.items()
        if any(mean is not None for mean, _ in row)
    ]
    rows.insert(0, ("runs", *(len(v.runs) for v in variants)))
    has_seeds = any(len(v.runs) > 1 for v in variants)
    note = "Mean ± standard deviation over the runs of a variant." if has_seeds else ""
    table = page.table(rows, ("", *(v.name for v in variants)), numbers=True)
    return page.card("Final values", table, legend=_legend(variants), note=note, wide=True)


def _differences(variants: Sequence[Variant]) -> str:
    """Return the table of settings in which the variants differ."""
    all_settings = [settings(variant.runs[0]) for variant in variants]
    rows = [
        (name, *(one.get(name, "–") for one in all_settings))
        for name in dict.fromkeys(name for one in all_settings for name in one)
        if any(one.get(name) != all_settings[0].get(name) for one in all_settings)
    ]
    header = ("setting", *(variant.name for variant in variants))
    same = page.placeholder("All runs have the same settings, except for the seed.")
    return page.card("Differing settings", page.table(rows, header) if rows else same, wide=True)


def _single_runs(variants: Sequence[Variant]) -> str:
    header = ("run", "variant", "bits/byte", "training loss", "steps", "tokens", "time", "")
    table = page.table((_run_row(v, run) for v in variants for run in v.runs), header)
    return page.card("All runs", page.collapsible("Show", table), wide=True)


def _run_row(variant: Variant, run: RunFiles) -> list[str]:
    tokens, seconds = pick(run.records, "tokens").last, active_seconds(run)
    return [
        run.name,
        variant.name,
        page.format_number(_FINAL["validation, bits/byte"](run)),
        page.format_number(_FINAL["training, nats/token, smoothed"](run)),
        page.format_number(pick(run.records, "step").last),
        "–" if tokens is None else compact(tokens),
        "–" if seconds is None else clock_text(seconds),
        status_text(run),
    ]


def _card(panel: Panel, variants: Sequence[Variant]) -> str:
    """Return the card of one panel; all metrics of a run have the color of its variant."""
    curves = [curve for variant in variants for curve in _curves(panel, variant)]
    if not curves:
        return ""
    first = next(name for v in variants for run in v.runs for name in _overlaid_metrics(panel, run))
    chart = line_chart(
        sorted(curves, key=lambda curve: not curve.faint),
        title=panel.title,
        x_label="tokens",
        line_at=panel.line_at,
        line_label=panel.line_label,
        clip_outliers=panel.clip_outliers,
    )
    title = f"{panel.title}: {panel.labels[0]}" if len(panel.labels) > 1 else panel.title
    return page.card(title, chart, unit=unit_of(first), legend=_legend(variants), note=panel.note)


def _curves(panel: Panel, variant: Variant) -> Iterator[Curve]:
    by_metric: dict[str, list[Series]] = {}
    for run in variant.runs:
        for name in _overlaid_metrics(panel, run):
            curves = curves_of(pick(run.records, name, "tokens"), short_label(name), variant.color, panel.smoothed)
            by_metric.setdefault(name, []).append(curves[-1].series)
    for name, all_series in by_metric.items():
        mean = mean_curve(all_series)
        for series in all_series:
            yield Curve(series, short_label(name), variant.color, faint=mean is not None)
        if mean is not None:
            yield Curve(mean, short_label(name), variant.color)


def _overlaid_metrics(panel: Panel, run: RunFiles) -> list[str]:
    """Return the metrics of a panel to overlay: those of its first row in the table, at all depths."""
    present = logged_metrics(panel, run.records)
    return [name for name in present if row_name(name) == row_name(present[0])]


def _legend(variants: Sequence[Variant]) -> list[tuple[str, str, str]]:
    return [(variant.name, variant.color, "") for variant in variants]


def _median(series: Series) -> float | None:
    return float(np.median(series.finite)) if len(series.finite) else None
