#!/usr/bin/env python3
"""Measure this project's speed, alone or against stock megatron-core and transformers.

    tools/benchmarks/bench.py period [--tokens 4096,8192,16384] [--contestants ours,stock,transformers] [--profile]
    tools/benchmarks/bench.py gdn    [--sequence-length 4096,65536]
    tools/benchmarks/bench.py steps  --config-name pretrain-tiny [setting=value …] [--profile]
    tools/benchmarks/bench.py start  --config-name pretrain-small
    tools/benchmarks/bench.py layouts [--rows stage,wide:EP2] [--steps 6]

period  one period of the architecture (3 Gated DeltaNet layers and 1 attention layer, each with its MoE):
        forward and backward of a model of two periods minus those of one, so that embedding and head cancel.
        Contestants alternate on one machine with the same shapes, tokens and seed. No optimizer, no activation
        checkpointing, auxiliary losses and MTP off, fp32 main gradients (transformers: --transformers-gradients).
        In FP8, the time to quantize our experts' weights, once per step, is reported separately.
gdn     Gated DeltaNet layers alone, measured in the same way.
steps   whole optimizer steps of a recipe, as in training.
layouts whole optimizer steps in every parallel layout on one and two GPUs (comparison/layout_rows.py).
start   from process start to the end of the first optimizer step, with empty and with filled compile caches.

All accept setting=value to change the recipe. Tokens are random; only --json and --logs write files.
Compare ratios within one run, since machines and their load differ. FLOPs are counted as in
megatron_q3n/config/sizes.py; MFU is relative to this GPU's measured rate in an 8192³ bf16 GEMM.
"""

import time

# before the slow imports, which are part of the time to the first step
PROCESS_START = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from megatron_q3n.config import EXIT_BAD_INPUT, UserError  # noqa: E402
from megatron_q3n.recipe import configure, register_defaults  # noqa: E402
from tools.benchmarks.comparison import cases, findings, interleaving, layout_rows, layouts, startup, steps, tables  # noqa: E402

# the width of the released model; one GPU has memory for two periods with 128 experts
RECIPE, EXPERTS = ("pretrain-80b_a3b", "128")
MODES = ("period", "gdn", "steps", "start", "layouts")
# experts are built and not run in mode gdn: few take less time
GDN_EXPERTS = "model.num_moe_experts=16"


def main() -> int:
    """Parse, measure, print.

    Returns: 0; 1 if a contestant failed or was another model; 2 for bad input.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in (*MODES, "-h", "--help"):
        arguments = ["steps", *arguments]
    options, rest = _parser().parse_known_args(arguments)
    register_defaults()
    try:
        status, figures = options.measure(options, rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    modes = parser.add_subparsers(required=True, metavar="mode")
    for name, measure in (("period", _compare), ("gdn", _compare)):
        mode = modes.add_parser(name, allow_abbrev=False)
        mode.set_defaults(measure=measure, part="step" if name == "period" else "gated_delta_net")
        _add_comparison_options(mode)
    mode = modes.add_parser("steps", allow_abbrev=False)
    mode.set_defaults(measure=_steps)
    mode.add_argument("--steps", type=int, default=20, help="timed steps, after the warm-up")
    mode.add_argument("--warmup", type=int, default=3)
    mode.add_argument("--profile", action="store_true", help="kernel time by group")
    mode = modes.add_parser("start", allow_abbrev=False)
    mode.set_defaults(measure=_start)
    mode.add_argument("--warm-starts", type=int, default=1, help="starts after the cold one")
    mode = modes.add_parser("layouts", allow_abbrev=False)
    mode.set_defaults(measure=_layouts)
    mode.add_argument("--rows", help="groups or rows, separated by commas; default all")
    mode.add_argument("--steps", type=int, default=6, help="timed steps of a row")
    mode.add_argument("--timeout-seconds", type=int, default=540, help="for all rows of one number of GPUs")
    for mode in modes.choices.values():
        mode.add_argument("--json", type=Path, help="write the figures here too")
    return parser


def _add_comparison_options(mode: argparse.ArgumentParser) -> None:
    add = mode.add_argument
    add("--config-name", default=RECIPE, help="recipe with the dimensions")
    add(
        "--contestants",
        default="ours,stock,transformers",
        help="ours, stock, transformers; with :PART for a precision, e.g. ours:fp8_tensorwise",
    )
    add("--precision", default="bf16", help="of contestants without :PART")
    add("--experts", help=f"experts per layer, e.g. 128,256,512; default {EXPERTS} for {RECIPE}, else the recipe's")
    add("--sequence-length", default="4096")
    add("--tokens", help="tokens of a micro-batch, e.g. 4096,16384; default one sequence")
    add("--vocabulary", type=int, default=4096, help="small, since it cancels in the difference")
    add("--routing", choices=("balanced", "real"), default="balanced")
    add("--rounds", type=int, default=2, help="measurements of each contestant and size")
    add("--iterations", type=int, default=8, help="timed steps of a measurement")
    add("--warmup", type=int, default=3, help="steps before them")
    add("--profile", action="store_true", help="kernel time by group, kernel launches, gaps")
    add("--transformers-gradients", choices=("bf16", "fp32"), default="bf16")
    add(
        "--stock",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a TransformerConfig field for stock, as JSON, e.g. moe_router_fusion=false",
    )
    add("--logs", type=Path, help="folder for the contestants' output; default a temporary one")


def _compare(options: argparse.Namespace, rest: list[str]) -> tuple[int, dict[str, Any]]:
    for name in ("rounds", "iterations", "warmup", "vocabulary"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1.")
    is_gdn_only = options.part == "gated_delta_net"
    contestants = cases.contestants_named(options.contestants, options.precision)
    if is_gdn_only and any("fp8" in contestant.precision for contestant in contestants):
        raise UserError("gdn measures the layers outside the model's FP8 context; use bf16 or fp32.")
    overrides = [*([GDN_EXPERTS] if is_gdn_only else []), *rest]
    setting = cases.Setting(options.config_name, options.routing, options.vocabulary, tuple(overrides))
    experts = options.experts or (EXPERTS if options.config_name == RECIPE and not is_gdn_only else None)
    shapes = cases.cases_of(experts, options.sequence_length, options.tokens)
    configurations = {
        (case, contestant, periods): cases.config_of(setting, case, contestant, periods)
        for case in shapes
        for contestant in contestants
        for periods in cases.PERIODS
    }
    settings = interleaving.Options(
        options.part,
        options.rounds,
        options.iterations,
        options.warmup,
        2 if options.profile else 0,
        _fields(options.stock),
        options.transformers_gradients,
    )
    with tempfile.TemporaryDirectory() as folder:
        logs = options.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        report = lambda line: print(line, flush=True)
        entries, flops = interleaving.measure_all(configurations, settings, logs, report)
    rows = findings.rows_of(entries, configurations, settings, flops)
    return _conclude(options, entries, rows, flops)


def _conclude(
    options: argparse.Namespace, entries: list[Any], rows: list[Any], flops: float | None
) -> tuple[int, dict[str, Any]]:
    """Print the findings, and whether all contestants ran the same model. Returns: exit status and figures."""
    wrong = findings.disagreements(rows)
    console = tables.console()
    console.print()
    tables.show_comparison(rows, console)
    rate = f"{flops / 1e12:.0f} TFLOP/s in an 8192³ bf16 product" if flops else "not measured"
    what = "per Gated DeltaNet layer" if options.part != "step" else "per period"
    console.print(
        f"{what}, forward and backward; {options.routing} routing, vocabulary {options.vocabulary:,}; "
        f"transformers' gradients {options.transformers_gradients}; this card: {rate}"
    )
    counted = {f"{row['parameters']:,}" for row in rows if row.get("parameters")}
    if counted and not wrong:
        console.print(f"all contestants agree on a period's parameters: {', '.join(sorted(counted))}")
    for line in wrong:
        console.print(f"NOT COMPARABLE: {line}", style="bold red")
    figures = {
        "command": sys.argv[1:],
        "matmul_flops_per_second": flops,
        "contestants": {
            p.contestant.label: {
                **(p.ready.about if p.ready else {}),
                "device": p.ready.device if p.ready else None,
                "ready_seconds": p.ready.seconds if p.ready else None,
                "failure": p.failure,
            }
            for p in entries
        },
        "rows": rows,
        "parameter_disagreements": wrong,
    }
    failed = wrong or any(row["failure"] for row in rows)
    return int(bool(failed)), figures


def _fields(assignments: list[str]) -> dict[str, Any]:
    fields = {}
    for item in assignments:
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--stock {item}: give FIELD=VALUE, e.g. moe_router_fusion=false.")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            # a bare word is a string
            fields[name] = value
    return fields


def _steps(options: argparse.Namespace, rest: list[str]) -> tuple[int, dict[str, Any]]:
    if options.steps < 1 or options.warmup < 0:
        raise UserError("--steps must be at least 1, and --warmup at least 0.")
    figures = steps.measure(
        configure(rest),
        process_start=PROCESS_START,
        warmup=options.warmup,
        steps=options.steps,
        profiled_steps=2 if options.profile else 0,
    )
    tables.show_figures(figures, tables.console())
    return 0, figures


def _layouts(options: argparse.Namespace, rest: list[str]) -> tuple[int, dict[str, Any]]:
    if rest:
        raise UserError(f"layouts takes no settings, found {' '.join(rest)}; the rows are in layout_rows.py.")
    if options.steps < 1:
        raise UserError(f"--steps {options.steps}: must be at least 1.")
    rows = layout_rows.rows_named(options.rows)
    figures = layouts.measure(rows, options.steps, options.timeout_seconds, lambda line: print(line, flush=True))
    tables.console().print(layouts.table_of(rows, figures))
    return int(any("failure" in found for found in figures.values())), figures


def _start(options: argparse.Namespace, rest: list[str]) -> tuple[int, dict[str, Any]]:
    if options.warm_starts < 1:
        raise UserError(f"--warm-starts {options.warm_starts}: must be at least 1.")
    # refuses a wrong setting before a process starts
    configure(rest)
    figures = startup.measure(rest, options.warm_starts)
    tables.show_figures(figures, tables.console())
    return 0, figures


if __name__ == "__main__":
    sys.exit(main())
