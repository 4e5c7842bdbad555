"""What is refused before submission: an allocation is too dear to find it out.

The recipe itself has been validated when these run. The data is looked at where the command runs, so on a machine
that sees the cluster's file system.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_q3n import checkpoint
from megatron_q3n.checkpoint import integrity
from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.config.rl import PromptSource
from megatron_q3n.config.sft import ConversationSource
from megatron_q3n.config.sizes import parameters
from megatron_q3n.data.blend import load_blends
from megatron_q3n.planner import Card, plan
from slurm.site import Site

GIB = 2**30
MASTER_AND_MOMENTS_BYTES = 12  # fp32, per parameter


def check_run(
    config: RunConfig, site: Site, num_nodes: int, before: RunConfig | None = None, *, loads_later: bool = False
) -> None:
    """Refuse a validated recipe that cannot run on this site.

    With `loads_later` a stage before it is yet to make its checkpoint, `before` if that is a recipe.

    Raises: UserError.
    """
    _check_ranks(config, site, num_nodes)
    _check_data(config)
    if config.checkpoint.load and (before is not None or not loads_later):
        _check_beginning(config, before)
    _check_memory(config, site)
    _check_space(config)


def checkpoint_bytes(config: RunConfig) -> float:
    """Return the size of one checkpoint: weights in their format, master copy and two moments in fp32."""
    weight = 2 if config.precision.compute == "bf16" else 4
    return parameters(config.model).total_with_mtp * (weight + MASTER_AND_MOMENTS_BYTES)


def _check_ranks(config: RunConfig, site: Site, num_nodes: int) -> None:
    if config.world_size % num_nodes:
        raise UserError(
            f"{config.world_size} processes do not spread evenly over {num_nodes} nodes; choose --nodes or "
            f"parallel.world_size so that they do (this site: {site.ranks_per_node} per node)."
        )
    if site.gpus_per_node == 0 and config.precision.fp8:
        raise UserError("precision.fp8 needs GPUs; this site has gpus_per_node: 0.")


def _check_data(config: RunConfig) -> None:
    """Look for the data where it can be told without reading it: folders with a manifest, files of conversations."""
    if config.stage in ("pretrain", "longcontext") or (config.stage == "mtp" and not config.sft.train):
        load_blends(config)
    named: dict[str, Sequence[ConversationSource | PromptSource]] = {
        "sft.train": config.sft.train,
        "sft.validation": config.sft.validation,
        "rl.prompts": config.rl.prompts,
        "rl.held_out": config.rl.held_out,
    }
    for setting, sources in named.items():
        for source in sources:
            if source.path is not None and not Path(source.path).expanduser().exists():
                raise UserError(
                    f"{setting}: there is no {source.path} on this machine. Name a file that is there; submit from a "
                    "machine that sees the cluster's file system."
                )


def _check_beginning(config: RunConfig, before: RunConfig | None) -> None:
    assert config.checkpoint.load is not None
    if before is not None:
        description = {"model": before.model.model_dump(mode="json")}
        checkpoint.check_architecture(description, config.model, Path(config.checkpoint.load))
        return
    found = checkpoint.find(config.checkpoint.load)
    checkpoint.check_architecture(integrity.read(found), config.model, found)


def _check_memory(config: RunConfig, site: Site) -> None:
    if site.gpu_memory_gib is None or site.gpus_per_node == 0:
        return
    made = plan(config, Card("this site's GPU", site.gpu_memory_gib))
    if not made.fits:
        raise UserError(
            f"the largest rank needs {made.largest.total / GIB:.1f} GiB, a GPU of this site gives "
            f"{made.card.usable_gib:.1f} GiB to tensors. See the table with dry_run=true; split the model further, "
            "or recompute."
        )


def _check_space(config: RunConfig) -> None:
    place = Path(config.run_dir or config.runs_dir).absolute()
    while not place.exists():
        place = place.parent
    checkpoints = config.checkpoint.keep_last + 1  # the next one is written before the oldest goes
    if every := config.checkpoint.keep_every_steps:
        checkpoints += config.training.steps // every
    needed, free = checkpoints * checkpoint_bytes(config), shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{place}: {free / GIB:.1f} GiB free, {checkpoints} checkpoints take about {needed / GIB:.1f} GiB. Choose "
            "another runs_dir, or lower checkpoint.keep_last or keep_every_steps."
        )
