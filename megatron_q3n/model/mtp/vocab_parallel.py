"""Tokens and distributions over a vocabulary that tensor-parallel ranks hold in parts: what drafts need of logits.

Every rank of the group gets the same answer. Statistics are fp32.

Shapes: S positions, B rows, V this rank's part of the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor


def likeliest_tokens(logits_SBV: Tensor, group: Any) -> Tensor:
    """Return the likeliest token everywhere, int64 [S,B]."""
    best, token = logits_SBV.detach().max(-1)
    if group.size() == 1:
        return token
    token = token + group.rank() * logits_SBV.shape[-1]
    both = torch.stack([best.double(), token.double()])
    everyone = [torch.empty_like(both) for _ in range(group.size())]
    torch.distributed.all_gather(everyone, both, group=group)
    best, token = torch.stack(everyone, 1)
    return token.gather(0, best.argmax(0, keepdim=True))[0].long()


def probabilities(logits_SBV: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Return this rank's part of softmax, fp32 [S,B,V], and the logarithm of its normalizer [S,B]."""
    logits = logits_SBV.detach().float()
    highest = logits.amax(-1)
    _reduce(highest, torch.distributed.ReduceOp.MAX, group)
    exponentials = (logits - highest[..., None]).exp_()
    total = exponentials.sum(-1)
    _reduce(total, torch.distributed.ReduceOp.SUM, group)
    return exponentials.div_(total[..., None]), highest + total.log()


def overlap(p_SBV: Tensor, q_SBV: Tensor, group: Any) -> Tensor:
    """Return Σ min(p, q), the chance that a token drawn from q is kept for a target p, [S,B].

    Reference: Leviathan et al. (arXiv 2211.17192), equation for the acceptance rate.
    """
    shared = torch.minimum(p_SBV, q_SBV).sum(-1)
    _reduce(shared, torch.distributed.ReduceOp.SUM, group)
    return shared


class Divergence(torch.autograd.Function):
    """KL(softmax(target) ‖ softmax(logits)) in nats, [S,B]; the target gets no gradient."""

    @staticmethod
    def forward(ctx: Any, logits_SBV: Tensor, target_SBV: Tensor, group: Any) -> Tensor:
        """Compute it, and keep q - p, the gradient."""
        p, log_zp = probabilities(target_SBV, group)
        q, log_zq = probabilities(logits_SBV, group)
        crossed = (p * (target_SBV.detach().float() - logits_SBV.detach().float())).sum(-1)
        _reduce(crossed, torch.distributed.ReduceOp.SUM, group)
        ctx.save_for_backward(q.sub_(p).to(logits_SBV.dtype))
        return crossed - log_zp + log_zq

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Scale q - p."""
        (difference,) = ctx.saved_tensors
        return difference * gradients[0][..., None].to(difference.dtype), None, None


def coin(tokens_BS: Tensor, positions_BS: Tensor, step: Tensor) -> Tensor:
    """Return numbers in [0, 1), fp32 [B,S], from token, position and step alone.

    The same in every layout and after a resumption, and a CUDA graph can replay it.
    """
    mixed = tokens_BS * 0x1B873593 + positions_BS * 0x2545F491 + step * 0x1E3779B9 + 0x27D4EB2F
    for factor in (0x2C1B3C6D, 0x297A2D39):
        mixed = ((mixed ^ (mixed >> 15)) * factor) & 0x7FFFFFFF
    return ((mixed >> 7) & 0xFFFFFF).float() / 2**24


def _reduce(tensor: Tensor, operation: Any, group: Any) -> None:
    if group.size() > 1:
        torch.distributed.all_reduce(tensor, operation, group=group)
