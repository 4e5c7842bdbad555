"""Curves ready to draw: picked from the records, smoothed, and thinned without losing a spike."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_q3n.metrics.jsonl import Record

MAX_POINTS = 1500  # of one drawn curve; more than a screen has pixels across
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One metric over the run: `x` (steps or tokens) and `y` of equal length; y holds nan where it was not finite."""

    x: Array
    y: Array

    def __len__(self) -> int:
        return len(self.x)

    @property
    def finite(self) -> Array:
        """The values that are numbers."""
        return self.y[np.isfinite(self.y)]

    @property
    def last(self) -> float | None:
        """The last value that is a number."""
        return float(self.finite[-1]) if len(self.finite) else None

    @property
    def num_not_finite(self) -> int:
        """How many values were nan or infinite."""
        return len(self.y) - len(self.finite)


def pick(records: Sequence[Record], name: str, x_name: str = "step") -> Series:
    """Return the metric `name` over the records that hold it."""
    rows = [(record[x_name], record[name]) for record in records if name in record and x_name in record]
    table = np.asarray(rows, dtype=np.float64).reshape(-1, 2)
    return Series(table[:, 0], table[:, 1])


def names_in(records: Iterable[Record]) -> list[str]:
    """Return every metric name that occurs, in order of first occurrence."""
    return list(dict.fromkeys(name for record in records for name in record))


def smooth(series: Series) -> Series:
    """Return the centred, triangular moving average over about a thirtieth of the run.

    Values not finite have no weight. Centred, because a trailing average lags behind a falling loss and would end
    above it.
    """
    if not len(series):
        return series
    half = max(3, min(len(series) // 60, len(series) // 2))
    window = np.bartlett(2 * half + 3)[1:-1]
    known = np.isfinite(series.y)
    total = _convolve(np.where(known, series.y, 0.0), window)
    weight = _convolve(known.astype(np.float64), window)
    average = np.divide(total, weight, out=np.full(len(series), np.nan), where=weight > 1e-9)
    return Series(series.x, average)


def _convolve(values: Array, window: Array) -> Array:
    half = len(window) // 2
    return np.convolve(values, window, mode="full")[half : half + len(values)]


def thin(series: Series, max_points: int = MAX_POINTS) -> Series:
    """Return at most `max_points` points: each bucket's minimum and maximum, in their order, so that spikes stay.

    A bucket without a finite value becomes one nan, a gap in the line.
    """
    if len(series) <= max_points:
        return series
    kept: list[int] = []
    for bucket in np.array_split(np.arange(len(series)), max_points // 2):
        finite = bucket[np.isfinite(series.y[bucket])]
        if len(finite):
            ends = {int(finite[np.argmin(series.y[finite])]), int(finite[np.argmax(series.y[finite])])}
            kept += sorted(ends)
        else:
            kept.append(int(bucket[0]))
    return Series(series.x[kept], series.y[kept])
