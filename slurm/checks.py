"""Checks before submission, which reject runs that would fail in the allocation.

The recipe itself is already validated. Data files are checked on the machine where the command runs, which must
therefore have access to the cluster's file system.
"""

import contextlib
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_q3n import checkpoint
from megatron_q3n.checkpoint import integrity
from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.config.rl import PromptSource
from megatron_q3n.config.sft import ConversationSource
from megatron_q3n.config.sizes import parameters
from megatron_q3n.config.start_model import with_saved_model
from megatron_q3n.data.blend import load_blends
from megatron_q3n.planner import Gpu, plan
from slurm.site import Site
from slurm.snapshot import ROOT

EXPORT_TOOL = "tools/convert_hf.py"
GIB = 2**30
# bytes per parameter: fp32 master weights and two Adam moments
MASTER_AND_MOMENTS_BYTES = 12


def check_run(
    config: RunConfig, site: Site, num_nodes: int, before: RunConfig | None = None, *, loads_later: bool = False
) -> None:
    """Check that a validated recipe can run on this site.

    With `loads_later` its checkpoint will be written by a previous stage; `before` is that stage's configuration if the
    stage is a recipe.

    Raises: UserError if ranks, data, checkpoint, GPU memory or disk space do not fit.
    """
    _check_ranks(config, site, num_nodes)
    _check_data(config)
    if config.checkpoint.load and (before is not None or not loads_later):
        _check_loaded_checkpoint(config, before)
    _check_memory(config, site)
    _check_space(config)


def check_tool(stage: str, command: list[str], config: RunConfig | None) -> None:
    """Check that the command of a stage can run: its program exists, and an export suits the model before it.

    config: the configuration of the stage that it starts from, if that is a recipe.

    Raises: UserError if the program is missing, or the model cannot be exported with these options.
    """
    program = command[0]
    if not program.startswith("-") and not (ROOT / program).is_file():
        raise UserError(f"stage {stage}: tool: {program} does not exist in {ROOT}.")
    if program == EXPORT_TOOL and command[1:2] == ["export"]:
        _check_export(stage, command[1:], config)


def _check_export(stage: str, arguments: list[str], config: RunConfig | None) -> None:
    # imports torch, which only this check needs
    from megatron_q3n.hf.model_config import family_of
    from megatron_q3n.hf.published_config import to_published
    from megatron_q3n.hf.weights import CONFIG, read_json
    from tools.convert_hf import parse

    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            options = parse(arguments)
    except SystemExit:
        reason = message.getvalue().strip().splitlines() or ["its options are not valid"]
        raise UserError(f"stage {stage}: {EXPORT_TOOL}: {reason[-1]}") from None
    for option, folder in (("--like", options.like), ("--tokenizer", options.tokenizer)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"stage {stage}: {option} {folder}: no such folder on this machine.")
    if config is not None:
        like = read_json(options.like / CONFIG) if options.like else None
        try:
            to_published(config.model, family_of(options.model_type, options.like), like)
        except UserError as error:
            raise UserError(f"stage {stage} cannot export the model of its `from`: {error}") from None


def checkpoint_bytes(config: RunConfig) -> float:
    """Return the size of one checkpoint in bytes: weights in their dtype, master weights and two moments in fp32."""
    weight = 2 if config.precision.compute == "bf16" else 4
    return parameters(config.model).total_with_mtp * (weight + MASTER_AND_MOMENTS_BYTES)


def _check_ranks(config: RunConfig, site: Site, num_nodes: int) -> None:
    if config.world_size % num_nodes:
        raise UserError(
            f"{config.world_size} processes cannot be divided evenly over {num_nodes} nodes; change --nodes or "
            f"parallel.world_size (this site: {site.ranks_per_node} per node)."
        )
    if site.gpus_per_node == 0 and config.precision.fp8:
        raise UserError("precision.fp8 needs GPUs; this site has gpus_per_node: 0.")


def _check_data(config: RunConfig) -> None:
    """Check that data folders and files exist, without reading their contents."""
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
                    f"{setting}: {source.path} does not exist on this machine. Correct the path, or submit from a "
                    "machine with access to the cluster's file system."
                )


def _check_loaded_checkpoint(config: RunConfig, before: RunConfig | None) -> None:
    assert config.checkpoint.load is not None
    if before is not None:
        source, description = Path(config.checkpoint.load), {"model": before.model.model_dump(mode="json")}
    else:
        source = checkpoint.find(config.checkpoint.load)
        description = integrity.read_manifest(source)
    checkpoint.check_architecture(description, with_saved_model(config, description["model"]).model, source)


def _check_memory(config: RunConfig, site: Site) -> None:
    if site.gpu_memory_gib is None or site.gpus_per_node == 0:
        return
    memory_plan = plan(config, Gpu("this site's GPU", site.gpu_memory_gib))
    if not memory_plan.fits:
        raise UserError(
            f"the largest rank needs {memory_plan.largest.total / GIB:.1f} GiB, but a GPU of this site has "
            f"{memory_plan.gpu.usable_gib:.1f} GiB for tensors. See the table with dry_run=true; increase model "
            "parallelism, or enable activation checkpointing (training.recompute_granularity)."
        )


def _check_space(config: RunConfig) -> None:
    folder = Path(config.run_dir or config.runs_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    # the next checkpoint is written before the oldest is deleted
    num_checkpoints = config.checkpoint.keep_last + 1
    if interval := config.checkpoint.keep_every_steps:
        num_checkpoints += config.training.steps // interval
    needed, free = num_checkpoints * checkpoint_bytes(config), shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / GIB:.1f} GiB free, {num_checkpoints} checkpoints take about {needed / GIB:.1f} GiB. "
            "Choose another runs_dir, lower checkpoint.keep_last, or raise checkpoint.keep_every_steps."
        )
