"""Charts as inline SVG, drawn by matplotlib in the colors of the page.

matplotlib does not support CSS variables. Each color role (ink, grid, the curves) is therefore drawn in a unique
color, which is then replaced by `var(--role)` in the SVG text, so that one drawing works in the light and the dark
theme. Text remains text, in the page's font. pyplot is not used, because it has global state.
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

from megatron_q3n.metrics.expert_load_image import LOAD_COLORS, relative_expert_load
from megatron_q3n.metrics.report.series import Array, Series, downsample

NUM_COLORS = 8
ROLES = ["ink", "soft", "grid", *(f"c{k}" for k in range(NUM_COLORS))]
COLOR = {role: f"#0{k:01x}fe0{k:01x}" for k, role in enumerate(ROLES)}

POINTS_PER_INCH = 72
# in points; the page scales charts to the card
WIDTH, HEIGHT = 560, 250
# ratio of largest to smallest value
LOG_SCALE_ABOVE = 50.0
# clip_outliers applies to curves with more points
CLIP_ABOVE_POINTS = 30
MAX_NON_FINITE_MARKS = 200
MAX_LABELLED_CELLS = 96

_STYLE: Any = {
    "svg.fonttype": "none",
    # makes the output reproducible byte for byte
    "svg.hashsalt": "megatron_q3n",
    "font.size": 10.5,
    "axes.edgecolor": COLOR["grid"],
    "axes.labelcolor": COLOR["soft"],
    "xtick.color": COLOR["soft"],
    "ytick.color": COLOR["soft"],
    "text.color": COLOR["ink"],
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
    """One line of a chart: its series, label and color role. `faint` is the raw curve behind a smoothed one."""

    series: Series
    label: str
    color: str
    faint: bool = False
    markers: bool = False


def line_chart(
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str = "step",
    line_at: float | None = None,
    line_label: str = "",
    clip_outliers: bool = False,
    log2_x: bool = False,
    unit_interval: bool = False,
) -> str:
    """Return an SVG of the curves, with a dashed horizontal line at `line_at`.

    The y axis is logarithmic if the values span more than a factor of 50. With `clip_outliers` it covers the 1st to
    99th percentile, with a margin. With `log2_x` the x axis is logarithmic (base 2), with a tick at each x value. With
    `unit_interval` the y axis covers 0 to 1.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH / POINTS_PER_INCH, HEIGHT / POINTS_PER_INCH), layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            _draw(axes, curve)
        if line_at is not None:
            _draw_reference_line(axes, line_at, line_label)
        _style_axes(axes, x_label)
        values = np.concatenate([curve.series.finite for curve in curves] or [np.zeros(0)])
        _scale(axes, values, clip_outliers)
        if unit_interval:
            axes.set_ylim(-0.02, 1.02)
        if log2_x:
            _set_log2_x(axes, np.unique(np.concatenate([curve.series.x for curve in curves])))
        return _svg(figure, title)


def heat_map(shares: Sequence[Sequence[float]], row_names: Sequence[str], *, title: str) -> str:
    """Return an SVG heat map of load over layers (rows) and experts (columns), in multiples of the layer's mean."""
    load = relative_expert_load(shares)
    rows = len(load)
    cells_height = min(max(16 * rows, 40), 480)
    height = 70 + cells_height
    with matplotlib.rc_context(_STYLE):
        size = (2 * WIDTH / POINTS_PER_INCH, height / POINTS_PER_INCH)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        max_load = max(2.0, float(load.max()))
        norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=max_load)
        image = axes.imshow(load, cmap=LOAD_COLORS, norm=norm, aspect="auto", interpolation="nearest")
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=cells_height / 10, ticks=[0, 1, max_load])
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.set_yticklabels(["0", "mean", f"{max_load:.2g}×"])
        axes.set_xlabel("expert")
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        stride = -(-rows // 24)
        axes.set_yticks(range(0, rows, stride), [row_names[r] for r in range(0, rows, stride)])
        axes.spines[:].set_visible(False)
        if load.size <= MAX_LABELLED_CELLS:
            _label_cells(axes, load)
        return _svg(figure, title)


def layer_map(table: Array, steps: Sequence[float], row_names: Sequence[str], *, title: str) -> str:
    """Return an SVG heat map of a per-layer metric: layers (rows, the first at the top) over steps.

    The colors are logarithmic if the values span more than a factor of 50.
    """
    finite = table[np.isfinite(table)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    is_log = low > 0 and high / low > LOG_SCALE_ABOVE
    norm: Any = LogNorm(low, high) if is_log else Normalize(low, high if high > low else low + 1)
    with matplotlib.rc_context(_STYLE):
        size = (WIDTH / POINTS_PER_INCH, HEIGHT / POINTS_PER_INCH)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(table, cmap="viridis", norm=norm, aspect="auto", interpolation="nearest")
        bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=30, ticks=[low, high])
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.minorticks_off()
        bar.ax.set_yticklabels([_format_tick(low), _format_tick(high)])
        stride = -(-len(row_names) // 12)
        axes.set_yticks(range(0, len(row_names), stride), row_names[::stride])
        axes.set_ylabel("layer")
        shown = np.unique(np.linspace(0, len(steps) - 1, min(6, len(steps))).astype(int))
        axes.set_xticks(shown, [f"{steps[k]:,.0f}" for k in shown])
        axes.set_xlabel("step")
        axes.spines[:].set_visible(False)
        return _svg(figure, title)


def _draw(axes: Axes, curve: Curve) -> None:
    series = downsample(curve.series)
    few = len(series.finite) <= 1
    axes.plot(
        series.x,
        series.y,
        color=COLOR[curve.color],
        linewidth=0.8 if curve.faint else 1.7,
        alpha=0.28 if curve.faint else 1.0,
        marker="o" if few or curve.markers else None,
        markersize=4 if few else 3.2,
        solid_joinstyle="round",
    )
    # marks on the x axis where values were not finite
    x = curve.series.x[~np.isfinite(curve.series.y)][:MAX_NON_FINITE_MARKS]
    if len(x):
        along_axis = axes.get_xaxis_transform()
        axes.plot(x, np.zeros(len(x)), "|", color=COLOR["c5"], transform=along_axis, clip_on=False)


def _draw_reference_line(axes: Axes, level: float, label: str) -> None:
    """Draw a dashed line with its label at the left below it, where falling curves leave space."""
    axes.axhline(level, color=COLOR["soft"], linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        label,
        (0, level),
        xycoords=("axes fraction", "data"),
        xytext=(4, -11),
        textcoords="offset points",
        color=COLOR["soft"],
        fontsize=9.5,
    )


def _style_axes(axes: Axes, x_label: str) -> None:
    axes.grid(axis="y", color=COLOR["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label)
    axes.margins(x=0.015, y=0.1)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _set_log2_x(axes: Axes, ticks: Array) -> None:
    """Make the x axis logarithmic (base 2), with the given ticks."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [_format_tick(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(ticks[0] / 2**0.25, ticks[-1] * 2**0.25)


def _scale(axes: Axes, values: Array, clip_outliers: bool) -> None:
    """Set range, scale and tick labels of the axes from the values."""
    left, right = axes.get_xlim()
    # a single step
    if right - left < 2:
        axes.set_xlim((left + right) / 2 - 1, (left + right) / 2 + 1)
    if not len(values):
        axes.set_yticks([])
        return
    counts = bool((values == np.round(values)).all())
    if counts and values.min() == values.max():
        axes.set_ylim(values[0] - 1, values[0] + 1)
    if clip_outliers and len(values) > CLIP_ABOVE_POINTS:
        low, high = np.percentile(values, [1, 99])
        pad = 0.25 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - pad, high + pad)
    elif values.min() > 0 and values.max() / values.min() > LOG_SCALE_ABOVE:
        axes.set_yscale("log")
        steps_of_ten = (1, 2, 5) if values.max() / values.min() < 1000 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=steps_of_ten))
        axes.yaxis.set_major_formatter(lambda value, _: _format_tick(value))
        axes.yaxis.set_minor_locator(NullLocator())
        return
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=counts))
    if np.abs(values).max() >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif np.abs(values).max() >= 0.01:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _format_tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _label_cells(axes: Axes, load: Array) -> None:
    for row, column in np.ndindex(load.shape):
        text = f"{load[row, column]:.2f}"
        axes.text(column, row, text, ha="center", va="center", color="#ffffff", fontsize=9.5)


def _svg(figure: Figure, title: str) -> str:
    """Return the figure as an `<svg>` element that scales with its card and uses the page's colors and font."""
    out = io.StringIO()
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(out, format="svg", transparent=True, metadata=no_metadata)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for role, color in COLOR.items():
        text = text.replace(color, f"var(--{role})")
    label = escape(title, quote=True)
    return re.sub(
        r'<svg (.*?)width="[^"]*"(.*?)height="[^"]*"|<svg ',
        lambda match: _open_svg_tag(match, label),
        text,
        count=1,
        flags=re.DOTALL,
    )


def _open_svg_tag(match: re.Match[str], label: str) -> str:
    return f'<svg role="img" aria-label="{label}" {match.group(1) or ""}{match.group(2) or ""}'
