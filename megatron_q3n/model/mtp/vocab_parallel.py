"""Vocabulary-parallel operations for drafts: argmax, softmax, overlap and KL divergence over sharded logits.

Every tensor-parallel rank gets the same result. Statistics are fp32.

Shapes: S positions, B rows, V this rank's part of the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def argmax_tokens(logits_SBV: Tensor, group: ProcessGroup) -> Tensor:
    """Return the most probable token at every position, int64 [S,B]."""
    best, token = logits_SBV.detach().max(-1)
    if group.size() == 1:
        return token
    token = token + group.rank() * logits_SBV.shape[-1]
    local = torch.stack([best.double(), token.double()])
    gathered = [torch.empty_like(local) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, local, group=group)
    best, token = torch.stack(gathered, 1)
    return token.gather(0, best.argmax(0, keepdim=True))[0].long()


def probabilities(logits_SBV: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return this rank's part of the softmax, fp32 [S,B,V], and the logarithm of its normalizer [S,B]."""
    logits = logits_SBV.detach().float()
    highest = logits.amax(-1)
    _reduce(highest, torch.distributed.ReduceOp.MAX, group)
    exponentials = (logits - highest[..., None]).exp_()
    total = exponentials.sum(-1)
    _reduce(total, torch.distributed.ReduceOp.SUM, group)
    return exponentials.div_(total[..., None]), highest + total.log()


def overlap(p_SBV: Tensor, q_SBV: Tensor, group: ProcessGroup) -> Tensor:
    """Return Σ min(p, q), the probability that a draft sampled from q is accepted for a target p, [S,B].

    Reference: Leviathan et al. (arXiv 2211.17192), equation of the acceptance rate.
    """
    total = torch.minimum(p_SBV, q_SBV).sum(-1)
    _reduce(total, torch.distributed.ReduceOp.SUM, group)
    return total


class Divergence(torch.autograd.Function):
    """KL(softmax(target) ‖ softmax(logits)) in nats, [S,B]; the target gets no gradient."""

    @staticmethod
    def forward(ctx: Any, logits_SBV: Tensor, target_SBV: Tensor, group: ProcessGroup) -> Tensor:
        """Compute the divergence, and save its gradient q - p."""
        p, log_zp = probabilities(target_SBV, group)
        q, log_zq = probabilities(logits_SBV, group)
        expected_difference = (p * (target_SBV.detach().float() - logits_SBV.detach().float())).sum(-1)
        _reduce(expected_difference, torch.distributed.ReduceOp.SUM, group)
        ctx.save_for_backward(q.sub_(p).to(logits_SBV.dtype))
        return expected_difference - log_zp + log_zq

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Scale q - p by the incoming gradient."""
        (difference,) = ctx.saved_tensors
        return difference * gradients[0][..., None].to(difference.dtype), None, None


def hashed_uniform(tokens_BS: Tensor, positions_BS: Tensor, step: Tensor) -> Tensor:
    """Return pseudo-random numbers in [0, 1), fp32 [B,S], by hashing token, position and step.

    They are the same in every parallel layout and after a resumption, and a CUDA graph can replay the function.
    """
    mixed = tokens_BS * 0x1B873593 + positions_BS * 0x2545F491 + step * 0x1E3779B9 + 0x27D4EB2F
    for factor in (0x2C1B3C6D, 0x297A2D39):
        mixed = ((mixed ^ (mixed >> 15)) * factor) & 0x7FFFFFFF
    return ((mixed >> 7) & 0xFFFFFF).float() / 2**24


def _reduce(tensor: Tensor, operation: Any, group: ProcessGroup) -> None:
    if group.size() > 1:
        torch.distributed.all_reduce(tensor, operation, group=group)
