"""Input tokens of all contestants: the same ones, uniformly random, on the device before timing starts."""

import torch
from torch import Tensor

from megatron_q3n.config import RunConfig


def random_rows(config: RunConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return one random micro-batch, from the run's seed.

    Returns: tokens and next tokens, both [B,T].
    """
    size, length = config.training.micro_batch_size, config.training.sequence_length
    generator = torch.Generator().manual_seed(config.training.seed)
    rows = torch.randint(0, config.model.vocab_size, (size, length + 1), generator=generator)
    rows = rows.to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
