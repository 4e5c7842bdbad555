"""Log probabilities and entropy from logits whose vocabulary is spread over tensor-parallel ranks.

Under the distribution that tokens were drawn from: divided by the temperature, ids that only pad the
embedding left out. fp32, differentiable; each rank gets the same numbers, and the gradient of its own part.

Shapes: B rows, T tokens, V this rank's part of the vocabulary.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor


def log_probabilities(
    logits_BTV: Tensor, labels_BT: Tensor, group: Any, *, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Return the labels' log probabilities [B,T], and the entropy of each distribution [B,T], in nats."""
    part = logits_BTV.shape[-1]
    first = group.rank() * part
    logits = logits_BTV.float() / temperature
    is_padding_V = torch.arange(first, first + part, device=logits.device) >= vocab_size
    logits = logits.masked_fill(is_padding_V, torch.finfo(logits.dtype).min)
    shifted = logits - _largest(logits, group)[..., None]
    weights = shifted.exp().masked_fill(is_padding_V, 0.0)
    total_BT = _summed(weights.sum(-1), group)
    local_BT = labels_BT - first
    is_here_BT = (local_BT >= 0) & (local_BT < part)
    own_BT = shifted.gather(-1, local_BT.clamp(0, part - 1)[..., None]).squeeze(-1)
    own_BT = _summed(torch.where(is_here_BT, own_BT, 0.0), group)
    mean_BT = _summed((weights * shifted.masked_fill(is_padding_V, 0.0)).sum(-1), group) / total_BT
    log_total_BT = total_BT.log()
    return own_BT - log_total_BT, log_total_BT - mean_BT


@torch.no_grad()
def _largest(logits: Tensor, group: Any) -> Tensor:
    largest = logits.max(-1).values
    if group.size() > 1:
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return largest


def _summed(x: Tensor, group: Any) -> Tensor:
    """Sum over ranks; every rank goes on with the same sum, so the gradient comes back as it is."""
    return reduce_from_tensor_model_parallel_region(x, group=group)
