"""The weights of a checkpoint alone, into models that are not trained: no optimizer is built for them."""

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_q3n.checkpoint import integrity
from megatron_q3n.checkpoint.reader import check_architecture, gathered
from megatron_q3n.config import RunConfig, UserError
from megatron_q3n.parallel import Parallel


def load_weights(models: list[Any], config: RunConfig, group: Parallel, checkpoint: Path) -> None:
    """Verify a checkpoint, then load its weights in whatever layout the models have. A collective call.

    Raises: UserError if the checkpoint is damaged or of another architecture.
    """
    own = integrity.damage(checkpoint, config.checkpoint.verify, group.rank, group.world_size)
    problems = dict.fromkeys(problem for found in gathered(group, own) for problem in found)
    if problems:
        raise UserError(f"{checkpoint} is damaged: " + "; ".join(problems) + ". Use another checkpoint.")
    check_architecture(integrity.read(checkpoint), config.model, checkpoint)
    metadata = {"dp_cp_group": group.groups.dp_cp}
    wanted = {f"model{index}": model.sharded_state_dict(metadata=metadata) for index, model in enumerate(models)}
    loaded = dist_checkpointing.load(wanted, str(checkpoint), strict=StrictHandling.RAISE_UNEXPECTED)
    for index, model in enumerate(models):
        model.load_state_dict(loaded[f"model{index}"], strict=False)
