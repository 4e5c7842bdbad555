"""Charts as inline SVG, drawn by matplotlib in the page's own colours.

matplotlib knows no CSS variables. So each role (ink, grid, the curves) is drawn in a colour that occurs nowhere
else, and that colour is replaced by `var(--role)` in the SVG text: the same drawing is legible on light and
dark paper. Text stays text, in the page's font. No pyplot: nothing global, nothing to close.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from megatron_q3n.metrics.expert_load_image import LOAD_COLOURS, over_even_share
from megatron_q3n.metrics.report.series import Array, Series, thin

NUM_COLOURS = 8
ROLES = ["ink", "soft", "grid", *(f"c{k}" for k in range(NUM_COLOURS))]
COLOUR = {role: f"#0{k:01x}fe0{k:01x}" for k, role in enumerate(ROLES)}

POINTS_PER_INCH = 72
WIDTH, HEIGHT = 560, 250  # in points, which the page scales to the card
LOG_SCALE_ABOVE = 50.0  # largest over smallest value
USUAL_ABOVE = 30  # points; fewer are all shown
MAX_MARKED = 200
MAX_WRITTEN_CELLS = 96

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_q3n",  # the same run gives the same bytes
    "font.size": 10.5,
    "axes.edgecolor": COLOUR["grid"],
    "axes.labelcolor": COLOUR["soft"],
    "xtick.color": COLOUR["soft"],
    "ytick.color": COLOUR["soft"],
    "text.color": COLOUR["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.useoffset": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.pad": 6,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Curve:
    """One line of a chart: its series, name, colour role, and whether it is the faint raw one behind a smoothed one."""

    series: Series
    label: str
    colour: str
    faint: bool = False
    markers: bool = False


def line_chart(
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str = "step",
    line_at: float | None = None,
    line_label: str = "",
    usual_range: bool = False,
    doubling_x: bool = False,
    is_share: bool = False,
) -> str:
    """Return an SVG of the curves, with a dashed horizontal line at `line_at`.

    The y axis is logarithmic where the values span more than a factor of fifty. With `usual_range` it covers
    what is usual and lets the odd first step run out of the frame. With `doubling_x` equal steps to the right are
    doublings, and every place that was measured is named. `is_share`: of something, so from 0 to 1.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH / POINTS_PER_INCH, HEIGHT / POINTS_PER_INCH), layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            _draw(axes, curve)
        if line_at is not None:
            _draw_level(axes, line_at, line_label)
        _dress(axes, x_label)
        values = np.concatenate([curve.series.finite for curve in curves] or [np.zeros(0)])
        _scale(axes, values, usual_range)
        if is_share:
            axes.set_ylim(-0.02, 1.02)
        if doubling_x:
            _double(axes, np.unique(np.concatenate([curve.series.x for curve in curves])))
        return _svg(figure, title)


def heat_map(shares: Sequence[Sequence[float]], row_names: Sequence[str], *, title: str) -> str:
    """Return an SVG of load over layers (rows) and experts (columns), in multiples of the even share."""
    load = over_even_share(shares)
    rows = len(load)
    cells_height = min(max(16 * rows, 40), 480)
    height = 70 + cells_height
    with matplotlib.rc_context(_STYLE):
        size = (2 * WIDTH / POINTS_PER_INCH, height / POINTS_PER_INCH)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        most = max(2.0, float(load.max()))
        norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=most)
        image = axes.imshow(load, cmap=LOAD_COLOURS, norm=norm, aspect="auto", interpolation="nearest")
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=cells_height / 10, ticks=[0, 1, most])
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.set_yticklabels(["0", "even", f"{most:.2g}×"])
        axes.set_xlabel("expert")
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        every = -(-rows // 24)
        axes.set_yticks(range(0, rows, every), [row_names[r] for r in range(0, rows, every)])
        axes.spines[:].set_visible(False)
        if load.size <= MAX_WRITTEN_CELLS:
            _write_cells(axes, load)
        return _svg(figure, title)


def layer_map(table: Array, steps: Sequence[float], row_names: Sequence[str], *, title: str) -> str:
    """Return an SVG of one number of every layer (rows, the first at the top) over the steps it was measured at.

    The colours are logarithmic where the values span more than a factor of fifty.
    """
    known = table[np.isfinite(table)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    wide = low > 0 and high / low > LOG_SCALE_ABOVE
    norm: Any = LogNorm(low, high) if wide else Normalize(low, high if high > low else low + 1)
    with matplotlib.rc_context(_STYLE):
        size = (WIDTH / POINTS_PER_INCH, HEIGHT / POINTS_PER_INCH)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(table, cmap="viridis", norm=norm, aspect="auto", interpolation="nearest")
        bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=30, ticks=[low, high])
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.minorticks_off()
        bar.ax.set_yticklabels([_four_digits(low), _four_digits(high)])
        every = -(-len(row_names) // 12)
        axes.set_yticks(range(0, len(row_names), every), row_names[::every])
        axes.set_ylabel("layer")
        shown = np.unique(np.linspace(0, len(steps) - 1, min(6, len(steps))).astype(int))
        axes.set_xticks(shown, [f"{steps[k]:,.0f}" for k in shown])
        axes.set_xlabel("step")
        axes.spines[:].set_visible(False)
        return _svg(figure, title)


def _draw(axes: Axes, curve: Curve) -> None:
    series = thin(curve.series)
    few = len(series.finite) <= 1
    axes.plot(
        series.x,
        series.y,
        color=COLOUR[curve.colour],
        linewidth=0.8 if curve.faint else 1.7,
        alpha=0.28 if curve.faint else 1.0,
        marker="o" if few or curve.markers else None,
        markersize=4 if few else 3.2,
        solid_joinstyle="round",
    )
    lost = curve.series.x[~np.isfinite(curve.series.y)][:MAX_MARKED]
    if len(lost):  # ticks on the x axis where there was no number
        along_axis = axes.get_xaxis_transform()
        axes.plot(lost, np.zeros(len(lost)), "|", color=COLOUR["c5"], transform=along_axis, clip_on=False)


def _draw_level(axes: Axes, level: float, label: str) -> None:
    """Draw the line, its label at the left below it: curves start high, so that corner is free."""
    axes.axhline(level, color=COLOUR["soft"], linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        label,
        (0, level),
        xycoords=("axes fraction", "data"),
        xytext=(4, -11),
        textcoords="offset points",
        color=COLOUR["soft"],
        fontsize=9.5,
    )


def _dress(axes: Axes, x_label: str) -> None:
    axes.grid(axis="y", color=COLOUR["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label)
    axes.margins(x=0.015, y=0.1)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _double(axes: Axes, places: Array) -> None:
    """Lay the x axis out by doublings, with a name for each place."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [_four_digits(place) for place in places])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(places[0] / 2**0.25, places[-1] * 2**0.25)


def _scale(axes: Axes, values: Array, usual_range: bool) -> None:
    """Choose range, scale and tick labels by the values drawn."""
    left, right = axes.get_xlim()
    if right - left < 2:  # a single step
        axes.set_xlim((left + right) / 2 - 1, (left + right) / 2 + 1)
    if not len(values):
        axes.set_yticks([])
        return
    counts = bool((values == np.round(values)).all())
    if counts and values.min() == values.max():
        axes.set_ylim(values[0] - 1, values[0] + 1)
    if usual_range and len(values) > USUAL_ABOVE:
        low, high = np.percentile(values, [1, 99])
        pad = 0.25 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - pad, high + pad)
    elif values.min() > 0 and values.max() / values.min() > LOG_SCALE_ABOVE:
        axes.set_yscale("log")
        steps_of_ten = (1, 2, 5) if values.max() / values.min() < 1000 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=steps_of_ten))
        axes.yaxis.set_major_formatter(lambda value, _: _four_digits(value))
        axes.yaxis.set_minor_locator(NullLocator())
        return
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=counts))
    if np.abs(values).max() >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif np.abs(values).max() >= 0.01:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _four_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _write_cells(axes: Axes, load: Array) -> None:
    for row, column in np.ndindex(load.shape):
        text = f"{load[row, column]:.2f}"
        axes.text(column, row, text, ha="center", va="center", color="#ffffff", fontsize=9.5)


def _svg(figure: Figure, title: str) -> str:
    """Return the figure as an `<svg>` element that scales with its card and takes the page's colours and font."""
    out = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for role, colour in COLOUR.items():
        text = text.replace(colour, f"var(--{role})")
    label = escape(title, quote=True)
    return re.sub(
        r'<svg (.*?)width="[^"]*"(.*?)height="[^"]*"|<svg ',
        lambda found: _open_tag(found, label),
        text,
        count=1,
        flags=re.DOTALL,
    )


def _open_tag(found: re.Match[str], label: str) -> str:
    return f'<svg role="img" aria-label="{label}" {found.group(1) or ""}{found.group(2) or ""}'
