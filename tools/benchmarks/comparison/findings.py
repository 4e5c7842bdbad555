"""What follows from the readings: one period's time, rate, memory and gaps, and who is how much faster.

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
from tools.benchmarks.comparison.referee import Configurations, Options, Player
from tools.benchmarks.comparison.worker import Reading

Row = dict[str, Any]


def rows_of(players: list[Player], configurations: Configurations, options: Options, flops: float | None) -> list[Row]:
    """Make one row for each case and contestant, in the order played; a failed one says why."""
    rows: list[Row] = []
    for case in dict.fromkeys(case for case, _, _ in configurations):
        first: Row | None = None
        for player in players:
            config = configurations[case, player.contestant, PERIODS[0]]
            row = _row(player, case, config, configurations, options, flops)
            rows.append(row)
            first = first or row
            if row["milliseconds"] and first["milliseconds"]:
                row["first_is_times_faster"] = row["milliseconds"] / first["milliseconds"]
            before = next(r for r in rows if r["contestant"] == row["contestant"])
            if row["milliseconds"] and before["milliseconds"]:
                row["rate_of_first_case"] = row["tokens_per_second"] / before["tokens_per_second"]
    return rows


def _row(
    player: Player, case: Case, config: RunConfig, configurations: Configurations, options: Options, flops: float | None
) -> Row:
    row: Row = {
        "case": case.label,
        **asdict(case),
        "experts": config.model.num_moe_experts,
        "contestant": player.contestant.label,
        "milliseconds": None,
        "failure": "",
        "first_step_seconds": player.first_step_seconds,
    }
    sizes = PERIODS if options.part == "step" else PERIODS[:1]
    readings = [player.readings.get((case, periods), []) for periods in sizes]
    good = [[r for r in part if not r.failure] for part in readings]
    if not all(good):
        bad = [r.failure for part in readings for r in part if r.failure]
        return row | {"failure": bad[0] if bad else player.failure or "not reached"}
    if options.part == "gated_delta_net":
        return row | _alone(good[0], case, config, flops)
    two_periods = configurations[case, player.contestant, PERIODS[1]]
    return row | _period(good[0], good[1], case, (config, two_periods), flops)


def _period(
    one: list[Reading], two: list[Reading], case: Case, configs: tuple[RunConfig, RunConfig], flops: float | None
) -> Row:
    """Take the difference of two periods and one."""
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
    """Say why a difference cannot be a period's time, where steps wait for a host that others disturb.

    A model of one period takes that period and what surrounds it: no less, and beyond it what embedding and head
    may take, with three times their share of its FLOPs as a generous limit.
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


def _renewing(one: list[Reading], two: list[Reading], seconds: float) -> Row:
    """Say what quantising a period's weights takes, and what a period takes with it."""
    times = [[r.renewing_seconds for r in part if r.renewing_seconds] for part in (one, two)]
    if not all(times):
        return {}
    apart = statistics.median(times[1]) - statistics.median(times[0])
    return {"renewing_milliseconds": apart * 1000, "milliseconds_and_renewing": (seconds + apart) * 1000}


def _alone(readings: list[Reading], case: Case, config: RunConfig, flops: float | None) -> Row:
    """Divide by the number of Gated DeltaNet layers."""
    layers = readings[0].mixers
    seconds = _median(readings) / layers
    spread = [r.median * 1000 / layers for r in readings]
    return {
        **_rates(seconds, case, gated_delta_net_flops(config.model) * case.tokens, flops),
        "milliseconds_by_round": [min(spread), max(spread)],
        "host_milliseconds": 1000 * _wall(readings) / layers,
        "peak_gib": max(r.peak_allocated_gib for r in readings),
        "samples": sum(len(r.seconds) for r in readings),
        **_profile(None, readings[-1], seconds, layers),
    }


def gated_delta_net_flops(model: ModelConfig) -> float:
    """Count the training FLOPs per token of one Gated DeltaNet layer, without its MoE."""
    alone = model.model_copy(update={"mixer_pattern": GATED_DELTA_NET, "num_layers": 1})
    count = flops_per_token(alone, 1)
    return count.projections + count.delta_rule


def disagreements(rows: list[Row]) -> list[str]:
    """Say where a contestant's period has not the parameters that the formula counts."""
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


def _profile(one: Reading | None, two: Reading, seconds: float, divisor: int = 1) -> Row:
    """Take kernels by group of the period alone, and what of its time no kernel runs."""
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


def _median(readings: list[Reading]) -> float:
    return statistics.median(s for reading in readings for s in reading.seconds)


def _wall(readings: list[Reading]) -> float:
    return statistics.median(reading.wall_seconds for reading in readings)
