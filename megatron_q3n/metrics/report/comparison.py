"""Several runs over each other on one page: the same panels as a single report, one colour per run, over tokens."""

from collections.abc import Sequence
from pathlib import Path

from megatron_q3n.config import UserError
from megatron_q3n.metrics.progress import clock_text
from megatron_q3n.metrics.report import page
from megatron_q3n.metrics.report.charts import NUM_COLOURS, Curve, line_chart
from megatron_q3n.metrics.report.panels import (
    Panel,
    curves_of,
    logged_names,
    panels_for,
    reading,
    row_name,
    short,
    unit_of,
)
from megatron_q3n.metrics.report.run_files import RunFiles, flatten, load
from megatron_q3n.metrics.report.series import pick, smooth
from megatron_q3n.metrics.report.single import VALIDATION, active_seconds, compact, status_text

_NOT_SETTINGS = {"run_dir", "runs_dir"}


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write a page that lays the curves of several runs over each other, and return its path.

    Raises: UserError when a directory is not a run's, or there are more runs than colours.
    """
    if not 2 <= len(run_dirs) <= NUM_COLOURS:
        raise UserError(
            f"--compare takes 2 to {NUM_COLOURS} run directories, found {len(run_dirs)}."
        )
    runs = [load(run_dir) for run_dir in run_dirs]
    records = [record for run in runs for record in run.records]
    panels = panels_for(records)
    sections = dict.fromkeys(panel.section for panel in panels)
    body = [
        page.section("Runs", [_overview(runs), _differences(runs)]),
        *(
            page.section(name, [_card(panel, runs) for panel in panels if panel.section == name])
            for name in sections
        ),
    ]
    return page.write(path, page.document(f"{len(runs)} runs compared", "curves over tokens", body))


def _overview(runs: Sequence[RunFiles]) -> str:
    header = ("run", "bits/byte", "validation loss", "training loss", "steps", "tokens", "time", "")
    keys = [(run.name, f"c{index}", "") for index, run in enumerate(runs)]
    table = page.table((_overview_row(run) for run in runs), header)
    return page.card("Where they ended", table, legend=keys, wide=True)


def _overview_row(run: RunFiles) -> list[str]:
    tokens, seconds = pick(run.records, "tokens").last, active_seconds(run)
    return [
        run.name,
        reading(pick(run.records, VALIDATION).last),
        reading(pick(run.records, "loss/validation").last),
        reading(smooth(pick(run.records, "loss/train")).last),
        reading(pick(run.records, "step").last),
        "–" if tokens is None else compact(tokens),
        "–" if seconds is None else clock_text(seconds),
        status_text(run),
    ]


def _differences(runs: Sequence[RunFiles]) -> str:
    """Return the settings in which the runs differ."""
    settings = [flatten(run.config) for run in runs]
    every = dict.fromkeys(name for one in settings for name in one)
    rows = [
        (name, *(one.get(name, "–") for one in settings))
        for name in every
        if name not in _NOT_SETTINGS
        and any(one.get(name) != settings[0].get(name) for one in settings)
    ]
    header = ("setting", *(run.name for run in runs))
    same = page.sentence("The runs have the same settings.")
    return page.card("Where they differ", page.table(rows, header) if rows else same, wide=True)


def _card(panel: Panel, runs: Sequence[RunFiles]) -> str:
    """Return one panel with a curve per run and metric; a second metric of the same run is drawn in the same colour."""
    curves: list[Curve] = []
    units = ""
    for index, run in enumerate(runs):
        for name in _shown(panel, run):
            units = unit_of(name)
            series = pick(run.records, name, "tokens")
            found = curves_of(series, short(name), f"c{index}", panel.noisy)
            curves += [curve for curve in found if not curve.faint]
    if not curves:
        return ""
    keys = [(run.name, f"c{index}", "") for index, run in enumerate(runs)]
    chart = line_chart(curves, title=panel.title, x_label="tokens", usual_range=panel.usual_range)
    return page.card(panel.title, chart, unit=units, legend=keys if len(runs) <= 3 else ())


def _shown(panel: Panel, run: RunFiles) -> list[str]:
    """Return the metrics of a panel to overlay: all depths of one row, else the panel's first."""
    present = logged_names(panel, run.records)
    return [name for name in present if row_name(name) == row_name(present[0])]
