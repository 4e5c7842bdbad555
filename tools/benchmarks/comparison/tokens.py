"""The tokens that every contestant is fed: the same ones, uniformly random, already on the device."""

import torch
from torch import Tensor

from megatron_q3n.config import RunConfig


def random_rows(config: RunConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw one micro-batch from the run's seed.

    Returns: tokens and what follows each, both [B,T].
    """
    size, length = config.training.micro_batch_size, config.training.sequence_length
    generator = torch.Generator().manual_seed(config.training.seed)
    rows = torch.randint(0, config.model.vocab_size, (size, length + 1), generator=generator)
    rows = rows.to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
