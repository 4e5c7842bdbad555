"""Rows of `tools/benchmarks/bench.py layouts`: what is trained in which layout, and against which row it is compared.

Shapes are those of the released model's width. `stage` is one pipeline stage of recipe pretrain-80b_a3b (12 layers, 64
experts a GPU, micro-batches of one sequence); `wide` has large micro-batches; `long` long sequences; `small` is
recipe pretrain-small. Routing is balanced, except for `small`.
"""

from dataclasses import dataclass

from megatron_q3n.config import UserError

WIDTH = (
    "--config-name",
    "pretrain-80b_a3b",
    "parallel=single",
    "training.recompute_granularity=null",
    "training.recompute_modules=[]",
    "model.vocab_size=8192",
    "data.stdlib_vocab_size=512",
    "model.mtp_num_layers=0",
    "model.moe_router_load_balancing_type=none",
    "model.moe_aux_loss_coeff=0",
    "model.megatron.moe_router_force_load_balancing=true",
)
SMALL = ("--config-name", "pretrain-small", "data.stdlib_packages=[]", "training.micro_batch_size=4")
RECOMPUTE = ("training.recompute_granularity=selective", "training.recompute_modules=[moe,gated_delta_net]")
FULL_RECOMPUTE = (
    "training.recompute_granularity=full",
    "training.recompute_method=uniform",
    "training.recompute_num_layers=1",
)
# captured collectives of tensor and context parallelism are not the default
GRAPH = "training.cuda_graph=true"
EP2, PP2 = ("parallel.expert_model_parallel_size=2",), ("parallel.pipeline_model_parallel_size=2",)
TP2 = ("parallel.tensor_model_parallel_size=2", GRAPH)
CP2 = ("parallel.context_parallel_size=2", GRAPH)


@dataclass(frozen=True)
class Row:
    """One measurement: its group and layout, GPUs, settings, and the layout of its group it is compared with."""

    group: str
    layout: str
    processes: int
    settings: tuple[str, ...]
    against: str = "1 GPU"

    @property
    def name(self) -> str:
        """The name by which `--rows` selects it."""
        return f"{self.group}:{self.layout}".replace(" ", "-")


def _sizes(layers: int, experts: int, sequence: int, micro: int, rows: int) -> tuple[str, ...]:
    return (
        *WIDTH,
        f"model.num_layers={layers}",
        f"model.num_moe_experts={experts}",
        f"model.max_position_embeddings={max(sequence, 32768)}",
        f"training.sequence_length={sequence}",
        f"training.micro_batch_size={micro}",
        f"training.global_batch_size={rows}",
    )


def _small(rows: int, *layout: str) -> tuple[str, ...]:
    return (*SMALL, f"training.global_batch_size={rows}", *layout)


STAGE, WIDE = _sizes(12, 128, 4096, 1, 16), _sizes(4, 128, 4096, 4, 4)
ROWS = (
    Row("stage", "1 GPU", 1, _sizes(12, 64, 4096, 1, 8)),
    Row("stage", "EP2", 2, (*STAGE, *EP2)),
    Row("stage", "EP2 recompute", 2, (*STAGE, *EP2, *RECOMPUTE)),
    Row("stage", "EP2 alltoall", 2, (*STAGE, *EP2, "parallel.moe_token_dispatcher_type=alltoall")),
    Row("wide", "1 GPU", 1, WIDE),
    Row("wide", "EP2", 2, (*WIDE, *EP2, "training.global_batch_size=8")),
    Row("wide", "EP2 fp8", 2, (*WIDE, *EP2, "training.global_batch_size=8", "precision=fp8_tensorwise"), "EP2"),
    Row("wide", "DP2", 2, (*WIDE, "training.global_batch_size=8")),
    Row("wide", "TP2", 2, (*WIDE, *TP2)),
    Row("wide", "CP2", 2, (*WIDE, *CP2)),
    Row("wide", "PP2", 2, (*WIDE, *PP2, "training.micro_batch_size=2", "training.global_batch_size=16")),
    Row("long", "64K 1 GPU", 1, (*_sizes(4, 64, 65536, 1, 1), *FULL_RECOMPUTE)),
    Row("long", "128K CP2 EP2", 2, (*_sizes(4, 128, 131072, 1, 1), *CP2, *EP2, *FULL_RECOMPUTE), "64K 1 GPU"),
    Row("small", "1 GPU", 1, _small(8)),
    Row("small", "DP2", 2, _small(16)),
    Row("small", "EP2", 2, _small(16, *EP2)),
    Row("small", "TP2", 2, _small(8, *TP2)),
    Row("small", "CP2", 2, _small(8, *CP2)),
)


def rows_named(names: str | None) -> list[Row]:
    """Return the rows of these groups or names, separated by commas; all rows for None.

    Raises: UserError for an unknown name.
    """
    if names is None:
        return list(ROWS)
    chosen = []
    for name in names.split(","):
        found = [row for row in ROWS if name in (row.group, row.name)]
        if not found:
            groups = ", ".join(dict.fromkeys(row.group for row in ROWS))
            raise UserError(f"--rows {name}: give groups ({groups}) or rows: {', '.join(r.name for r in ROWS)}.")
        chosen += [row for row in found if row not in chosen]
    return chosen
