"""Curves of metrics: extracted from the records, smoothed, and downsampled with spikes preserved."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_q3n.metrics.jsonl import Record

# points of one drawn curve; about the width of a screen in pixels
MAX_POINTS = 1500
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One metric over the run: `x` (steps or tokens) and `y` of equal length; y is nan where it was not finite."""

    x: Array
    y: Array

    def __len__(self) -> int:
        return len(self.x)

    @property
    def finite(self) -> Array:
        """The finite values."""
        return self.y[np.isfinite(self.y)]

    @property
    def last(self) -> float | None:
        """The last finite value, or None."""
        return float(self.finite[-1]) if len(self.finite) else None

    @property
    def num_not_finite(self) -> int:
        """Number of values that were nan or infinite."""
        return len(self.y) - len(self.finite)


def pick(records: Sequence[Record], name: str, x_name: str = "step") -> Series:
    """Return the series of metric `name` over the records that have it."""
    rows = [(record[x_name], record[name]) for record in records if name in record and x_name in record]
    table = np.asarray(rows, dtype=np.float64).reshape(-1, 2)
    return Series(table[:, 0], table[:, 1])


def names_in(records: Iterable[Record]) -> list[str]:
    """Return every metric name that occurs, in order of first occurrence."""
    return list(dict.fromkeys(name for record in records for name in record))


def smooth(series: Series) -> Series:
    """Return the centered triangular moving average over about 1/30 of the run.

    Non-finite values have no weight. The window is centered, because a trailing average lags behind a falling loss.
    """
    if not len(series):
        return series
    half = max(3, min(len(series) // 60, len(series) // 2))
    window = np.bartlett(2 * half + 3)[1:-1]
    is_finite = np.isfinite(series.y)
    total = _convolve(np.where(is_finite, series.y, 0.0), window)
    weight = _convolve(is_finite.astype(np.float64), window)
    average = np.divide(total, weight, out=np.full(len(series), np.nan), where=weight > 1e-9)
    return Series(series.x, average)


def _convolve(values: Array, window: Array) -> Array:
    half = len(window) // 2
    return np.convolve(values, window, mode="full")[half : half + len(values)]


def downsample(series: Series, max_points: int = MAX_POINTS) -> Series:
    """Return at most `max_points` points: the minimum and maximum of each bucket, in order, so that spikes remain.

    A bucket without finite values becomes one nan, which draws as a gap.
    """
    if len(series) <= max_points:
        return series
    indices: list[int] = []
    for bucket in np.array_split(np.arange(len(series)), max_points // 2):
        finite = bucket[np.isfinite(series.y[bucket])]
        if len(finite):
            ends = {int(finite[np.argmin(series.y[finite])]), int(finite[np.argmax(series.y[finite])])}
            indices += sorted(ends)
        else:
            indices.append(int(bucket[0]))
    return Series(series.x[indices], series.y[indices])
