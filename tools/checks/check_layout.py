#!/usr/bin/env python3
"""Check of parallel layouts: train the same model on the same data, and compare every step with one process.

    tools/checks/check_layout.py --all                                  every layout of the built-in list
    tools/checks/check_layout.py tp2-pp2 cp2-ep2-overlap                layouts by short name
    tools/checks/check_layout.py tensor_model_parallel_size=2 expert_model_parallel_size=2
    tools/checks/check_layout.py pp2 --reshard tp2:pp2 --masked 0.3 model.mtp_num_layers=2
    tools/checks/check_layout.py --all instruments.interval_steps=2    also the numbers of the instruments

One process saves its initial weights; every layout loads them and takes the same steps on the same
rows, which also checks the resharding of weights. With --reshard A:B a run resumes in layout B from
the checkpoint that layout A saved halfway, and must equal A without an interruption. Data are random
walks over the vocabulary, a function of step and row only.

On a CPU, over gloo. Exit status: 0 all within tolerance, 1 not, 2 bad input.
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

from megatron_q3n.config import EXIT_BAD_INPUT, UserError, suggest
from megatron_q3n.config.parallel import ParallelConfig
from megatron_q3n.recipe import configure, register_defaults
from tools.checks.layout_runs import Data, Run, import_everything, launch

SINGLE = "single"
LAYOUTS = (
    "tp2",
    "tp2-etp2",
    "pp2",
    "pp2-vpp2",
    "ep2",
    "ep2-alltoall",
    "dp2",
    "dp2-overlap",
    "cp2",
    "cp2-passing",
    "tp2-ep2",
    "tp2-pp2",
    "tp2-cp2",
    "cp2-ep2",
    "pp2-ep2-overlap",
)
RESHARDS = (
    "single:tp2",
    "tp2:pp2",
    "single:ep2",
    "ep2:single",
    "dp2:cp2",
    "pp2:single",
    "pp2-vpp2:tp2",
    "tp2:tp2-etp2",
    "tp2-etp2:ep2",
    "ep2:pp2-ep2-overlap",
    "dp2-overlap:single",
)
SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "dp": "data parallel size",
}
WORDS = {
    "overlap": {"overlap_grad_reduce": "true", "overlap_param_gather": "true"},
    "passing": {"linear_context_parallel": "state_passing"},
    "alltoall": {"moe_token_dispatcher_type": "alltoall"},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
}
# Small, divisible by all of the above, with a strong balance loss. A large epsilon prevents Adam from
# amplifying the last bit of a vanishing gradient to a full step, which other layouts cannot reproduce.
TINY = (
    "model.hidden_size=64",
    "model.kv_channels=16",
    "model.init_method_std=0.05",
    "model.moe_aux_loss_coeff=0.5",
    "training.sequence_length=64",
    "training.micro_batch_size=2",
    "training.global_batch_size=8",
    "training.steps=1000",
    "optimizer.adam_eps=1e-5",
    "schedule.lr=1e-3",
    "schedule.warmup_steps=2",
    "instruments.interval_steps=0",
    "instruments.global_rows=1000",
)
# figure of a step -> largest relative difference allowed
TOLERANCES = {"loss": 1e-5, "grad norm": 1e-4, "mtp": 1e-5, "balance": 1e-5, "inside": 1e-4}
# packed documents require micro-batches of one row
ONE_ROW = ("training.micro_batch_size=1", "training.global_batch_size=4")


def main() -> int:
    """Parse, run, compare, print."""
    options, words = _parser().parse_known_args()
    register_defaults()
    try:
        runs, verdicts = check(options, words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    show(verdicts)
    if options.json:
        figures = {run.name: {"seconds": run.seconds, "steps": run.steps} for run in runs}
        options.json.write_text(json.dumps({"verdicts": verdicts, "runs": figures}, indent=1))
    for run in runs:
        if run.problem:
            print(f"\n{run.name}: {run.problem}", file=sys.stderr)
    return 0 if all(verdict["ok"] for verdict in verdicts) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [LAYOUT …] [PARALLEL_SETTING=value …] [setting=value …] [options]",
    )
    parser.add_argument("--all", action="store_true", help=f"layouts: {', '.join(LAYOUTS)}")
    parser.add_argument("--reshard", nargs="*", metavar="A:B", help=f"without names: {', '.join(RESHARDS)}")
    parser.add_argument("--steps", type=_positive, default=10, help="save for --reshard halfway")
    parser.add_argument("--config-name", metavar="RECIPE", help="instead of a tiny model")
    parser.add_argument("--masked", type=float, default=0.0, help="share of targets masked out")
    parser.add_argument("--packed", action="store_true", help="rows are packed documents")
    parser.add_argument("--json", type=Path, help="write every run's figures here")
    parser.add_argument("--processes", type=_positive, default=4, help="at once")
    return parser


def _positive(text: str) -> int:
    """Parse a whole number above 0."""
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def check(options: argparse.Namespace, words: list[str]) -> tuple[list[Run], list[dict[str, Any]]]:
    """Plan all runs, make them, and compare.

    Raises: UserError, before anything starts, for a layout the configuration refuses.
    """
    names, settings = _sort_words(words)
    names += LAYOUTS if options.all else ()
    pairs = _pairs(options.reshard)
    if not names and not pairs:
        raise UserError("nothing to check: name a layout (tp2-pp2), or give --all or --reshard.")
    needed = dict.fromkeys([SINGLE, *names, *(source for source, _ in pairs)])
    recipe = ["--config-name", options.config_name or "pretrain-tiny"]
    base = [*recipe, "parallel=single", *(() if options.config_name else TINY)]
    base += [*(ONE_ROW if options.packed else ()), *settings]
    configs = {name: configure([*base, *_overrides(name)]) for name in [*needed, *(target for _, target in pairs)]}
    if not 0 <= options.masked < 1:
        raise UserError(f"--masked {options.masked}: a share from 0 to below 1 is needed.")
    if pairs and options.steps < 2:
        raise UserError("--reshard saves halfway; it needs --steps 2 or more.")
    data = Data(options.masked, options.packed)
    import_everything(configs[SINGLE])
    with tempfile.TemporaryDirectory(prefix="check_layout-") as folder:
        root, half = Path(folder), options.steps // 2
        layouts = {name: Run(name, configs[name], data, 0, options.steps) for name in needed}
        single = layouts.pop(SINGLE)
        single.save[0] = root / "fresh"
        for source, _ in pairs:
            (single if source == SINGLE else layouts[source]).save[half] = root / source
        launch([single], options.processes, root)
        if single.problem:
            return [single], [compare(single, single)]
        for run in layouts.values():
            run.start = single.save[0]
        launch(list(layouts.values()), options.processes, root)
        layouts[SINGLE] = single
        resumed = [Run(f"{a} → {b}", configs[b], data, half, options.steps, root / a, resume=True) for a, b in pairs]
        launch(resumed, options.processes, root)
    verdicts = [compare(run, single) for run in layouts.values() if run is not single]
    verdicts += [
        compare(run, replace(layouts[source], steps=layouts[source].steps[half:]))
        for run, (source, _) in zip(resumed, pairs)
    ]
    return [*layouts.values(), *resumed], verdicts


def _sort_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Separate layout names, parallel settings (together one layout) and other settings."""
    names = [word for word in words if "=" not in word]
    parallel = [word for word in words if word.split("=")[0] in ParallelConfig.model_fields]
    settings = [word for word in words if "=" in word and word not in parallel]
    return [*names, *([" ".join(parallel)] if parallel else [])], settings


def _pairs(words: list[str] | None) -> list[tuple[str, str]]:
    if words is None:
        return []
    for word in words:
        if word.count(":") != 1:
            raise UserError(f"--reshard {word}: expected two layouts, FROM:TO, such as tp2:pp2.")
    pairs = [tuple(word.split(":")) for word in words or RESHARDS]
    return [(source, target) for source, target in pairs]


def _overrides(layout: str) -> list[str]:
    """Return the overrides of a layout's name or settings, with the smallest possible world size."""
    if layout == SINGLE:
        return []
    if "=" in layout:
        settings = dict(word.split("=", 1) for word in layout.split())
        replicas = 1
    else:
        settings, replicas = _named(layout)
    size = {short: int(settings.get(name, 1)) for short, name in SIZES.items()}
    dense = size["tp"] * size["pp"] * size["cp"]
    world = math.lcm(dense * replicas, size["etp"] * size["ep"] * size["pp"])
    settings.setdefault("world_size", str(world))
    return [f"parallel.{name}={value}" for name, value in settings.items()]


def _named(layout: str) -> tuple[dict[str, str], int]:
    """Parse e.g. "tp2-ep2-overlap".

    Returns: settings, and the requested data parallel size.
    """
    settings: dict[str, str] = {}
    for word in layout.split("-"):
        sized = re.fullmatch(r"([a-z]+)(\d+)", word)
        if word in WORDS:
            settings |= WORDS[word]
        elif sized and sized[1] in SIZES:
            settings[SIZES[sized[1]]] = sized[2]
        else:
            raise UserError(
                f"{layout}: no such layout.{suggest(layout, LAYOUTS)} A name is any of {', '.join(SIZES)} with a "
                f"size, and {', '.join(WORDS)}, joined by -, e.g. tp2-ep2-overlap."
            )
    return settings, int(settings.pop(SIZES["dp"], 1))


def compare(run: Run, reference: Run) -> dict[str, Any]:
    """Return the largest relative difference over all steps for each kind of figure, and the verdict."""
    worst = dict.fromkeys(TOLERANCES, 0.0 if run.steps else math.nan)
    for ours, expected in zip(run.steps, reference.steps):
        for name in ours.keys() | expected.keys():
            kind = next(kind for kind in worst if name.startswith(kind))
            worst[kind] = _larger(worst[kind], _difference(ours.get(name), expected.get(name)))
    is_complete = len(run.steps) == len(reference.steps) > 0
    ok = is_complete and all(worst[kind] <= TOLERANCES[kind] for kind in worst)
    return {"layout": run.name, "processes": run.world_size, **worst, "ok": ok, "failed": not is_complete}


def _difference(ours: float | None, expected: float | None) -> float:
    """Return the relative difference; nan if only one side has the figure."""
    if ours is None or expected is None:
        return math.nan
    return 0.0 if ours == expected else abs(ours - expected) / max(abs(expected), 1e-30)


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def show(verdicts: list[dict[str, Any]]) -> None:
    """Print one line per layout: the largest relative differences from the reference, and the verdict."""
    table = Table(title="largest relative difference over all steps")
    for column in ("layout", "processes", *TOLERANCES, "verdict"):
        limit = f"\n≤ {TOLERANCES[column]:.0e}" if column in TOLERANCES else ""
        table.add_column(column + limit, justify="left" if column in ("layout", "verdict") else "right")
    for verdict in verdicts:
        figures = [f"{verdict[kind]:.1e}" for kind in TOLERANCES]
        words = "ok" if verdict["ok"] else "did not run" if verdict["failed"] else "DIFFERS"
        table.add_row(verdict["layout"], str(verdict["processes"]), *figures, words)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(main())
