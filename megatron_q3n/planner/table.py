"""The plan as a person reads it, at 80 columns: what the run is, one row per pipeline stage, a verdict."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_q3n.planner.activations import EXPERT_IMBALANCE
from megatron_q3n.planner.plan import GIB, Plan, StageMemory

_COLUMNS = (
    "stage",
    "layers",
    "in flight",
    "params",
    "weights",
    "grads",
    "optim",
    "activ",
    "work",
    "total",
)


def render(plan: Plan, console: Console) -> None:
    """Print the plan: sizes of model and run, memory per rank of each pipeline stage, and whether it fits."""
    console.print(_summary(plan))
    console.print(_memory_table(plan))
    console.print(_verdict(plan))


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
    grid.add_row(
        "batch",
        f"{training.global_batch_size:,} × {training.sequence_length:,} = {config.tokens_per_step:,} tokens per step, "
        f"in {config.num_microbatches} micro-batches of {training.micro_batch_size}",
    )
    grid.add_row("run", f"{training.steps:,} steps, {_short(plan.tokens_total)} tokens")
    grid.add_row(
        "compute",
        f"{_short(flops.total, 'FLOP')} per token with MTP, forward and backward; "
        f"{_short(flops.total * plan.tokens_total, 'FLOP')} in all",
    )
    grid.add_row("recompute", _recompute(plan))
    return grid


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
    ranks = f"{config.world_size} rank{'s' * (config.world_size > 1)}"
    return f"{ranks}: {cut}" if cut else ranks


def _recompute(plan: Plan) -> str:
    training = plan.config.training
    if training.recompute_granularity == "selective":
        return "selective: " + ", ".join(training.recompute_modules)
    if training.recompute_granularity == "full":
        return f"full, {training.recompute_method}, {training.recompute_num_layers} sublayers"
    return "none"


def _memory_table(plan: Plan) -> Table:
    table = Table(
        title="GiB per rank",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for stage in plan.stages:
        largest = stage is plan.largest
        style = ("bold green" if plan.fits else "bold red") if largest else ""
        table.add_row(*_cells(stage), style=style)
    return table


def _cells(stage: StageMemory) -> list[str]:
    states = stage.states
    amounts = (
        states.weights,
        states.gradients,
        states.optimizer,
        stage.activations,
        stage.working,
        stage.total,
    )
    return [
        str(stage.rank),
        "+".join(str(len(segment)) for segment in stage.segments),
        "+".join(str(count) for count in stage.in_flight),
        _short(stage.held.total),
        *(_gib(amount) for amount in amounts),
    ]


def _verdict(plan: Plan) -> Text:
    card, largest = plan.card, plan.largest
    text = Text(
        f"Layers are megatron-core's sublayers (two per layer); experts are taken to be {EXPERT_IMBALANCE:.0%} over "
        f"their even share of tokens.\n"
    )
    text.append(
        f"Largest: stage {largest.rank}, {_gib(largest.total)} GiB. It {'fits' if plan.fits else 'does NOT fit'} "
        f"{card.name} ({card.usable_gib:.1f} GiB usable: {card.memory_gib:.1f} less {card.reserve_gib:.1f} for context, "
        f"communication and fragmentation).",
        style="bold green" if plan.fits else "bold red",
    )
    text.append(
        f"\nAll {plan.config.world_size} ranks need {_gib(plan.all_ranks_bytes)} GiB; this machine has "
        f"{plan.host_gib:.1f} GiB of memory: on its CPU they {'fit' if plan.fits_host else 'do not fit'}."
    )
    return text


def _gib(amount: float) -> str:
    """Format bytes as GiB with three significant digits or so."""
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
