"""Weights of a checkpoint alone, loaded into models without an optimizer (inference and evaluation)."""

from pathlib import Path
from typing import Any

from megatron_q3n.checkpoint import integrity
from megatron_q3n.checkpoint.loading import load_sharded
from megatron_q3n.checkpoint.reader import check_architecture, find_damage_on_all_ranks
from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.parallel import Parallel


def load_weights(models: list[Any], config: RunConfig, group: Parallel, checkpoint: Path) -> None:
    """Verify a checkpoint, then load its weights into models of any parallel layout. A collective call.

    Raises: UserError if the checkpoint is damaged or of another architecture.
    """
    problems = find_damage_on_all_ranks(group, config.checkpoint.verify, checkpoint)
    if problems:
        raise UserError(f"{checkpoint} is damaged: " + "; ".join(problems) + ". Use another checkpoint.")
    check_architecture(integrity.read_manifest(checkpoint), config.model, checkpoint)
    metadata = {"dp_cp_group": group.groups.dp_cp}
    template = {f"model{index}": model.sharded_state_dict(metadata=metadata) for index, model in enumerate(models)}
    loaded = load_sharded(template, checkpoint, group)
    for index, model in enumerate(models):
        model.load_state_dict(loaded[f"model{index}"], strict=False)
