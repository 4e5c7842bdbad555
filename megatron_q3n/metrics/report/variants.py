"""Runs that differ in nothing but the seed are one variant: how they are told apart, named, and averaged."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_q3n.metrics.report.page import reading
from megatron_q3n.metrics.report.run_files import RunFiles, flatten
from megatron_q3n.metrics.report.series import Series

# what a run may differ in without being another variant, beside everything called seed
_SAME_IN_EFFECT = ("run_dir", "runs_dir", "dry_run", "logging.", "samples.", "alerts.")
MAX_NAMED_SETTINGS = 2


@dataclass(frozen=True)
class Variant:
    """One or more runs of the same settings, and the curve colour they share."""

    name: str
    colour: str
    runs: tuple[RunFiles, ...]


def group(runs: Sequence[RunFiles]) -> list[Variant]:
    """Sort runs into variants, in the order of their first runs; a run without config.yaml stands alone."""
    members: dict[str, list[RunFiles]] = {}
    for run in runs:
        key = repr(sorted(settings(run).items(), key=str)) if run.config else str(run.path)
        members.setdefault(key, []).append(run)
    names = _names([group[0] for group in members.values()])
    return [
        Variant(name, f"c{index}", tuple(group)) for index, (name, group) in enumerate(zip(names, members.values()))
    ]


def settings(run: RunFiles) -> dict[str, Any]:
    """Return the settings that make a variant."""
    return {
        name: value
        for name, value in flatten(run.config).items()
        if not name.startswith(_SAME_IN_EFFECT) and name.rsplit(".", 1)[-1] != "seed"
    }


def mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return the mean, and the standard deviation of a sample where there are two or more; None without numbers."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def spread_text(mean: float | None, spread: float | None) -> str:
    """Return "2.315 ± 0.004": the spread with two digits, the mean with as many places."""
    if mean is None or spread is None:
        return reading(mean)
    if spread == 0:
        return f"{reading(mean)} ± 0"
    digits = max(0, 1 - int(np.floor(np.log10(spread))))
    return f"{mean:,.{digits}f} ± {spread:,.{digits}f}"


def mean_curve(curves: Sequence[Series]) -> Series | None:
    """Return the mean of curves measured at the same places; None where there is one, or places differ."""
    if len(curves) < 2 or any(not np.array_equal(c.x, curves[0].x) for c in curves):
        return None
    return Series(curves[0].x, np.mean([c.y for c in curves], axis=0))


def _names(firsts: Sequence[RunFiles]) -> list[str]:
    """Name variants by recipe if that tells them apart, else by the few settings that differ, else by their runs."""
    recipes = [str(run.config.get("recipe", run.name)) for run in firsts]
    if len(set(recipes)) == len(recipes):
        return recipes
    every = [settings(run) for run in firsts]
    known = dict.fromkeys(name for one in every for name in one)
    differing = [n for n in known if any(one.get(n) != every[0].get(n) for one in every)]
    if not 0 < len(differing) <= MAX_NAMED_SETTINGS:
        return [run.name for run in firsts]
    return [", ".join(f"{name.rsplit('.', 1)[-1]}={one.get(name, '–')}" for name in differing) for one in every]
