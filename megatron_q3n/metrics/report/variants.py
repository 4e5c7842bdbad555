"""Variants of compared runs: runs that differ only in the seed are grouped, named, and averaged."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_q3n.metrics.report.page import format_number
from megatron_q3n.metrics.report.run_files import RunFiles, flatten
from megatron_q3n.metrics.report.series import Series

# settings that do not define a variant, in addition to all settings named seed
_IGNORED_SETTINGS = ("run_dir", "runs_dir", "dry_run", "logging.", "samples.", "alerts.")
MAX_NAMED_SETTINGS = 2


@dataclass(frozen=True)
class Variant:
    """One or more runs with the same settings, and their curve color."""

    name: str
    color: str
    runs: tuple[RunFiles, ...]


def group(runs: Sequence[RunFiles]) -> list[Variant]:
    """Group runs into variants, in the order of their first runs; a run without config.yaml is its own variant."""
    members: dict[str, list[RunFiles]] = {}
    for run in runs:
        key = repr(sorted(settings(run).items(), key=str)) if run.config else str(run.path)
        members.setdefault(key, []).append(run)
    names = _names([group[0] for group in members.values()])
    return [
        Variant(name, f"c{index}", tuple(group)) for index, (name, group) in enumerate(zip(names, members.values()))
    ]


def settings(run: RunFiles) -> dict[str, Any]:
    """Return the settings that define a variant."""
    return {
        name: value
        for name, value in flatten(run.config).items()
        if not name.startswith(_IGNORED_SETTINGS) and name.rsplit(".", 1)[-1] != "seed"
    }


def mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return the mean and sample standard deviation; the latter is None below two values, both without values."""
    present = [value for value in values if value is not None]
    if not present:
        return None, None
    return statistics.fmean(present), statistics.stdev(present) if len(present) > 1 else None


def spread_text(mean: float | None, spread: float | None) -> str:
    """Return "2.315 ± 0.004": the spread with two significant digits, the mean with the same number of decimals."""
    if mean is None or spread is None:
        return format_number(mean)
    if spread == 0:
        return f"{format_number(mean)} ± 0"
    digits = max(0, 1 - int(np.floor(np.log10(spread))))
    return f"{mean:,.{digits}f} ± {spread:,.{digits}f}"


def mean_curve(curves: Sequence[Series]) -> Series | None:
    """Return the mean of curves with identical x values; None for a single curve or different x values."""
    if len(curves) < 2 or any(not np.array_equal(c.x, curves[0].x) for c in curves):
        return None
    return Series(curves[0].x, np.mean([c.y for c in curves], axis=0))


def _names(firsts: Sequence[RunFiles]) -> list[str]:
    """Name variants by recipe if those are distinct, else by the differing settings if few, else by run name."""
    recipes = [str(run.config.get("recipe", run.name)) for run in firsts]
    if len(set(recipes)) == len(recipes):
        return recipes
    all_settings = [settings(run) for run in firsts]
    setting_names = dict.fromkeys(name for one in all_settings for name in one)
    differing = [n for n in setting_names if any(one.get(n) != all_settings[0].get(n) for one in all_settings)]
    if not 0 < len(differing) <= MAX_NAMED_SETTINGS:
        return [run.name for run in firsts]
    return [", ".join(f"{name.rsplit('.', 1)[-1]}={one.get(name, '–')}" for name in differing) for one in all_settings]
