"""Figures derived from the measurements: time, rate, memory and gaps of one period, and ratios between contestants.

FLOPs are counted as `megatron_q3n/config/sizes.py` states: useful work, the delta rule in its recurrent form,
causal attention over half the sequence, backward twice forward, nothing for recomputation.
"""

import statistics
from dataclasses import asdict
from typing import Any

from megatron_q3n.config import RunConfig
from megatron_q3n.config.model import GATED_DELTA_NET, ModelConfig
from megatron_q3n.config.sizes import flops_per_token, parameters
from tools.benchmarks.comparison.cases import PERIODS, Case
from tools.benchmarks.comparison.interleaving import Configurations, ContestantProcess, Options
from tools.benchmarks.comparison.worker import Measurement

Row = dict[str, Any]


def rows_of(
    entries: list[ContestantProcess], configurations: Configurations, options: Options, flops: float | None
) -> list[Row]:
    """Return one row for each case and contestant, in the order of measurement; a failed one has the reason."""
    rows: list[Row] = []
    for case in dict.fromkeys(case for case, _, _ in configurations):
        first: Row | None = None
        for entry in entries:
            config = configurations[case, entry.contestant, PERIODS[0]]
            row = _row(entry, case, config, configurations, options, flops)
            rows.append(row)
            first = first or row
            if row["milliseconds"] and first["milliseconds"]:
                row["first_is_times_faster"] = row["milliseconds"] / first["milliseconds"]
            before = next(r for r in rows if r["contestant"] == row["contestant"])
            if row["milliseconds"] and before["milliseconds"]:
                row["rate_of_first_case"] = row["tokens_per_second"] / before["tokens_per_second"]
    return rows


def _row(
    entry: ContestantProcess,
    case: Case,
    config: RunConfig,
    configurations: Configurations,
    options: Options,
    flops: float | None,
) -> Row:
    row: Row = {
        "case": case.label,
        **asdict(case),
        "experts": config.model.num_moe_experts,
        "contestant": entry.contestant.label,
        "milliseconds": None,
        "failure": "",
        "first_step_seconds": entry.first_step_seconds,
    }
    sizes = PERIODS if options.part == "step" else PERIODS[:1]
    measurements = [entry.measurements.get((case, periods), []) for periods in sizes]
    good = [[r for r in part if not r.failure] for part in measurements]
    if not all(good):
        bad = [r.failure for part in measurements for r in part if r.failure]
        return row | {"failure": bad[0] if bad else entry.failure or "not reached"}
    if options.part == "gated_delta_net":
        return row | _layer_figures(good[0], case, config, flops)
    two_periods = configurations[case, entry.contestant, PERIODS[1]]
    return row | _period(good[0], good[1], case, (config, two_periods), flops)


def _period(
    one: list[Measurement],
    two: list[Measurement],
    case: Case,
    configs: tuple[RunConfig, RunConfig],
    flops: float | None,
) -> Row:
    """Return the figures of one period: a model of two periods minus a model of one."""
    medians = [_median(one), _median(two)]
    seconds = medians[1] - medians[0]
    each = [(b.median - a.median) * 1000 for a, b in zip(one, two)]
    work = [flops_per_token(config.model, case.sequence_length).total * case.tokens for config in configs]
    counts = [parameters(config.model).total for config in configs]
    peaks = [max(r.peak_allocated_gib for r in part) for part in (one, two)]
    return {
        **_rates(seconds, case, work[1] - work[0], flops),
        "milliseconds_by_round": [min(each), max(each)],
        "one_period_model_ms": medians[0] * 1000,
        "two_period_model_ms": medians[1] * 1000,
        "host_milliseconds": 1000 * (_wall(two) - _wall(one)),
        "peak_gib": peaks[1],
        "period_gib": peaks[1] - peaks[0],
        "reserved_gib": max(r.peak_reserved_gib for r in two),
        "parameters": two[0].parameters - one[0].parameters,
        "parameters_by_formula": counts[1] - counts[0],
        "samples": sum(len(r.seconds) for r in two),
        "doubt": _doubt(medians, seconds, work, flops),
        **_renewing(one, two, seconds),
        **_profile(one[-1], two[-1], seconds),
    }


def _doubt(medians: list[float], seconds: float, work: list[float], flops: float | None) -> str:
    """Return why a difference cannot be a period's time; empty if it can. Steps that wait for a busy host cause this.

    The time of a one-period model must be at least a period, and exceed it by no more than embedding and head can
    take: three times their share of its FLOPs is a generous limit.
    """
    surroundings = (medians[0] - seconds) / medians[0]
    share = (2 * work[0] - work[1]) / work[0]
    fits = -0.1 <= surroundings <= 0.25 + 3 * share
    possible = flops is None or (work[1] - work[0]) / seconds <= flops
    if fits and possible and seconds > 0:
        return ""
    return (
        f"the model of one period takes {medians[0] * 1000:,.1f} ms and a second period {seconds * 1000:,.1f} ms more, "
        "which do not fit: something disturbed the steps, or they wait for the host. Give it more --rounds; by the "
        f"model of two, a period takes {medians[1] * 500:,.1f} ms at most, with its part of embedding and head."
    )


def _renewing(one: list[Measurement], two: list[Measurement], seconds: float) -> Row:
    """Return the time to quantize a period's weights, and a period's time including it."""
    times = [[r.quantize_seconds for r in part if r.quantize_seconds] for part in (one, two)]
    if not all(times):
        return {}
    apart = statistics.median(times[1]) - statistics.median(times[0])
    return {"renewing_milliseconds": apart * 1000, "milliseconds_and_renewing": (seconds + apart) * 1000}


def _layer_figures(measurements: list[Measurement], case: Case, config: RunConfig, flops: float | None) -> Row:
    """Return the figures of one Gated DeltaNet layer: the measured ones divided by the number of layers."""
    layers = measurements[0].mixers
    seconds = _median(measurements) / layers
    spread = [r.median * 1000 / layers for r in measurements]
    return {
        **_rates(seconds, case, gated_delta_net_flops(config.model) * case.tokens, flops),
        "milliseconds_by_round": [min(spread), max(spread)],
        "host_milliseconds": 1000 * _wall(measurements) / layers,
        "peak_gib": max(r.peak_allocated_gib for r in measurements),
        "samples": sum(len(r.seconds) for r in measurements),
        **_profile(None, measurements[-1], seconds, layers),
    }


def gated_delta_net_flops(model: ModelConfig) -> float:
    """Count the training FLOPs per token of one Gated DeltaNet layer, without its MoE."""
    one_layer = model.model_copy(update={"mixer_pattern": GATED_DELTA_NET, "num_layers": 1})
    count = flops_per_token(one_layer, 1)
    return count.projections + count.delta_rule


def disagreements(rows: list[Row]) -> list[str]:
    """Return a sentence for each contestant whose parameters of a period differ from the formula's count."""
    return [
        f"{row['case']}: a period of {row['contestant']} has {row['parameters']:,} parameters, "
        f"{row['parameters_by_formula']:,} by the formula"
        for row in rows
        if row.get("parameters") != row.get("parameters_by_formula")
    ]


def _rates(seconds: float, case: Case, work: float, flops: float | None) -> Row:
    return {
        "milliseconds": seconds * 1000,
        "tokens_per_second": case.tokens / seconds,
        "tflops_per_second": work / seconds / 1e12,
        "mfu": work / seconds / flops if flops else None,
        "tflop": work / 1e12,
    }


def _profile(one: Measurement | None, two: Measurement, seconds: float, divisor: int = 1) -> Row:
    """Return kernel times by group of one period, and the part of its time during which no kernel runs."""
    if two.profile is None:
        return {}
    zero: dict[str, float] = dict.fromkeys(two.profile.groups_ms, 0.0)
    less = one.profile if one else None
    subtract = lambda name: getattr(less, name) if less else 0.0
    groups = {
        group: (ms - (less.groups_ms if less else zero)[group]) / divisor for group, ms in two.profile.groups_ms.items()
    }
    busy = (two.profile.busy_ms - subtract("busy_ms")) / divisor
    return {
        "groups_ms": groups,
        "busy_ms": busy,
        "gap_ms": seconds * 1000 - busy,
        "kernels": (two.profile.kernels - subtract("kernels")) / divisor,
        "launches": (two.profile.launches - subtract("launches")) / divisor,
        "longest_kernels": two.profile.longest,
    }


def _median(measurements: list[Measurement]) -> float:
    return statistics.median(s for measurement in measurements for s in measurement.seconds)


def _wall(measurements: list[Measurement]) -> float:
    return statistics.median(measurement.wall_seconds for measurement in measurements)
