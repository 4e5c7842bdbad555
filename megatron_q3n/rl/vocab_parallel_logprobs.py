"""Log-probs and entropy from logits whose vocabulary is sharded over tensor-parallel ranks.

They are of the sampling distribution: logits divided by the temperature, without ids that only pad the embedding. fp32,
differentiable; every rank gets the same values, and the gradient of its own shard.

Shapes: B rows, T tokens, V this rank's shard of the vocabulary.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor


def logprobs_and_entropy(
    logits_BTV: Tensor, labels_BT: Tensor, group: Any, *, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Return the labels' log-probs [B,T] and the entropy of each distribution [B,T], in nats, fp32."""
    shard_size = logits_BTV.shape[-1]
    first = group.rank() * shard_size
    logits = logits_BTV.float() / temperature
    is_padding_V = torch.arange(first, first + shard_size, device=logits.device) >= vocab_size
    logits = logits.masked_fill(is_padding_V, torch.finfo(logits.dtype).min)
    shifted = logits - _global_max(logits, group)[..., None]
    weights = shifted.exp().masked_fill(is_padding_V, 0.0)
    total_BT = _global_sum(weights.sum(-1), group)
    local_BT = labels_BT - first
    is_local_BT = (local_BT >= 0) & (local_BT < shard_size)
    label_logit_BT = shifted.gather(-1, local_BT.clamp(0, shard_size - 1)[..., None]).squeeze(-1)
    label_logit_BT = _global_sum(torch.where(is_local_BT, label_logit_BT, 0.0), group)
    mean_logit_BT = _global_sum((weights * shifted.masked_fill(is_padding_V, 0.0)).sum(-1), group) / total_BT
    log_total_BT = total_BT.log()
    return label_logit_BT - log_total_BT, log_total_BT - mean_logit_BT


@torch.no_grad()
def _global_max(logits: Tensor, group: Any) -> Tensor:
    largest = logits.max(-1).values
    if group.size() > 1:
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return largest


def _global_sum(x: Tensor, group: Any) -> Tensor:
    """Sum over ranks; all ranks use the same sum, so the backward pass is the identity (no all-reduce)."""
    return reduce_from_tensor_model_parallel_region(x, group=group)
