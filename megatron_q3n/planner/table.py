"""Terminal output of a memory plan, in 80 columns: the run, one row per pipeline stage, and whether it fits."""

from collections.abc import Sequence
from math import ceil

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_q3n.config import RunConfig
from megatron_q3n.planner.activations import EXPERT_IMBALANCE
from megatron_q3n.planner.execution import execution_table
from megatron_q3n.planner.plan import GIB, Plan, StageMemory
from megatron_q3n.planner.plan import plan as make_plan
from megatron_q3n.planner.step_time import H200, predict

_COLUMNS = ("stage", "layers", "in flight", "params", "weights", "grads", "optim", "activ", "work", "total")
# these columns hold one number per model chunk
_MAY_WRAP = ("layers", "in flight")


def show(config: RunConfig, problems: Sequence[str] = ()) -> int:
    """Print a run's memory plan on the terminal (dry run), and after it what the run would lack on this machine.

    Returns: the exit code 0, whether or not the run fits, as the plan may be for another machine.
    """
    console = Console()
    render(make_plan(config), console)
    for problem in problems:
        console.print(
            Text(f"\nOn this machine the run would be refused: {problem}", style="bold yellow"), soft_wrap=True
        )
    return 0


def render(plan: Plan, console: Console) -> None:
    """Print the plan: sizes of model and run, memory per rank, whether it fits, and which path each part takes."""
    console.print(_summary(plan))
    console.print()
    console.print(_memory_table(plan))
    console.print()
    console.print(_verdict(plan))
    console.print()
    console.print(execution_table(plan.config))


def _summary(plan: Plan) -> Table:
    config, count = plan.config, plan.parameters
    flops, training = plan.flops_per_token, config.training
    grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    grid.add_row("recipe", f"{config.recipe} (dry run: nothing is built)")
    grid.add_row(
        "parameters",
        f"{_short(count.total)} + {_short(count.mtp)} MTP; active per token {_short(count.active)}, "
        f"{_short(count.active_with_embeddings)} with embedding and head",
    )
    grid.add_row("layout", _layout(plan))
    if config.world_size > 1:
        grid.add_row("placement", _placement(plan))
    grid.add_row(
        "batch",
        f"{training.global_batch_size:,} × {training.sequence_length:,} = {config.tokens_per_step:,} tokens per step, "
        f"{_counted(config.num_microbatches, 'micro-batch', 'es')} of {training.micro_batch_size} per rank",
    )
    grid.add_row("run", f"{training.steps:,} steps, {_short(plan.tokens_total)} tokens")
    grid.add_row(
        "compute",
        f"{_short(flops.total, 'FLOP')} per token with MTP, forward and backward; "
        f"{_short(flops.total * plan.tokens_total, 'FLOP')} in all",
    )
    grid.add_row("recompute", _recompute(plan))
    grid.add_row("predicted", _predicted(plan))
    return grid


def _predicted(plan: Plan) -> str:
    time = predict(plan.config, plan.largest.parameters)
    if time.seconds is None or time.mfu is None:
        return f"no step time: {time.reason}"
    return f"{1000 * time.seconds:,.0f} ms per step, {time.mfu:.0%} MFU, from kernels measured on an {H200.name}"


def _layout(plan: Plan) -> str:
    config, parallel = plan.config, plan.config.parallel
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "VPP": parallel.virtual_pipeline_model_parallel_size or 1,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
        "ETP": parallel.expert_tensor_parallel_size,
        "DP": config.data_parallel_size,
    }
    cut = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
    ranks = _counted(config.world_size, "rank")
    return f"{ranks}: {cut}" if cut else ranks


def _placement(plan: Plan) -> str:
    """Return the process groups with frequent communication that span nodes; rank order is TP, CP, DP, PP."""
    parallel = plan.config.parallel
    per_node, tensor = parallel.gpus_per_node, parallel.tensor_model_parallel_size
    spans = {
        "TP": tensor,
        "CP": tensor * parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size,
    }
    crossing = [name for name, span in spans.items() if per_node % span]
    nodes = _counted(ceil(plan.config.world_size / per_node), "node")
    where = f"{nodes} of {per_node} GPUs"
    if not crossing:
        return f"{where}: TP, CP and EP groups stay inside a node"
    return f"{where}: {' and '.join(crossing)} groups cross nodes, expect slow exchanges"


def _recompute(plan: Plan) -> str:
    training = plan.config.training
    if training.recompute_granularity == "selective":
        return "selective: " + ", ".join(training.recompute_modules)
    if training.recompute_granularity == "full":
        return f"full, {training.recompute_method}, {training.recompute_num_layers} sublayers"
    return "none"


def _memory_table(plan: Plan) -> Table:
    table = Table(
        title="GiB per rank of each pipeline stage",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=name not in _MAY_WRAP)
    for stage in plan.stages:
        largest = stage is plan.largest
        style = ("bold green" if plan.fits else "bold red") if largest else ""
        table.add_row(*_cells(stage), style=style)
    return table


def _cells(stage: StageMemory) -> list[str]:
    states = stage.states
    amounts = (states.weights, states.gradients, states.optimizer, stage.activations, stage.backward_bytes, stage.total)
    return [
        str(stage.rank),
        "+".join(str(len(segment)) for segment in stage.segments),
        "+".join(str(count) for count in stage.in_flight),
        _short(stage.parameters.total),
        *(_gib(amount) for amount in amounts),
    ]


def _verdict(plan: Plan) -> Text:
    gpu, largest = plan.gpu, plan.largest
    text = Text(
        "Layers are megatron-core's sublayers, two per layer. The fullest expert rank is assumed to hold "
        f"{EXPERT_IMBALANCE:.0%} more tokens than its even share.\n"
    )
    fits = "fits" if plan.fits else "does NOT fit"
    text.append(
        f"The largest rank, stage {largest.rank}, needs {_gib(largest.total)} GiB: it {fits} {gpu.name} "
        f"({gpu.usable_gib:.1f} GiB usable: {gpu.memory_gib:.1f} less {gpu.reserve_gib:.1f} for context, "
        "communication and fragmentation).\n",
        style="bold green" if plan.fits else "bold red",
    )
    ranks = _counted(plan.config.world_size, "rank")
    if plan.config.precision.fp8 is not None:
        return text.append(f"A machine without a GPU cannot run it: precision.fp8={plan.config.precision.fp8}.")
    return text.append(
        f"On this machine's CPU, {ranks} would take {_gib(plan.all_ranks_bytes)} of {plan.host_gib:.1f} GiB: "
        f"{'that fits' if plan.fits_host else 'too much'}."
    )


def _gib(amount: float) -> str:
    """Format bytes as GiB with about three significant digits."""
    value = amount / GIB
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def _short(number: float, unit: str = "") -> str:
    """Format a count with a decimal prefix: 79.67 B, 25.4 GFLOP."""
    prefixes = ("", "k", "M", "G" if unit else "B", "T", "P", "E", "Z")
    power = 0
    while abs(number) >= 1000 and power < len(prefixes) - 1:
        number, power = number / 1000, power + 1
    digits = 2 if power and number < 100 else 0 if not power else 1
    return f"{number:.{digits}f} {prefixes[power]}{unit}".rstrip()


def _counted(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural if number != 1 else ''}"
