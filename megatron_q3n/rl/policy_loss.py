"""Policy loss of each token, as pure functions of log-probs and advantages.

Log ratios are between the policy being trained and the policy at the start of the rollout ("old"). GRPO uses each
token's own ratio; GSPO the mean log ratio of its sequence (the logarithm of the geometric mean of the ratios), one
number for all its tokens. The clipped surrogate, the KL estimate and the truncated importance sampling correction for
the rollout engine are the same for both. `advantages.token_weights` gives the tokens' weights in the loss.

Shapes: T tokens of a packed row; `sample_T` is each token's sample index from 0, -1 at prompts and padding.
References: PPO (arXiv 1707.06347, eq. 7), GRPO (arXiv 2402.03300, eq. 3-4), GSPO (arXiv 2507.18071, eq. 5-7),
truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL").
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLosses:
    """Unweighted losses of the tokens [T]; ratios and clipping [T] for metrics, without gradient."""

    loss_T: Tensor
    ratio_T: Tensor
    is_clipped_T: Tensor


def log_ratios(logprobs_T: Tensor, old_T: Tensor, sample_T: Tensor, kind: Literal["token", "sequence"]) -> Tensor:
    """Return each token's log importance ratio: its own, or its sequence's mean; 0 where `sample_T` is -1."""
    is_response_T = sample_T >= 0
    own_T = torch.where(is_response_T, logprobs_T - old_T, 0.0)
    if kind == "token":
        return own_T
    index_T = sample_T.clamp(min=0)
    num_samples = int(index_T.max()) + 1
    sums = own_T.new_zeros(num_samples).index_add(0, index_T, own_T)
    lengths = own_T.new_zeros(num_samples).index_add(0, index_T, is_response_T.to(own_T.dtype))
    return torch.where(is_response_T, (sums / lengths.clamp(min=1))[index_T], 0.0)


def clipped_surrogate(log_ratio_T: Tensor, advantage_T: Tensor, clip_low: float, clip_high: float) -> TokenLosses:
    """Return -min(ratio · A, clip(ratio, 1 - low, 1 + high) · A) of each token."""
    ratio_T = log_ratio_T.exp()
    unclipped_T = ratio_T * advantage_T
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantage_T
    is_clipped_T = (clipped_T < unclipped_T).detach()
    return TokenLosses(-torch.minimum(unclipped_T, clipped_T), ratio_T.detach(), is_clipped_T)


def truncated_importance(old_T: Tensor, rollout_T: Tensor, cap: float | None) -> Tensor:
    """Return the truncated importance weight min(π_old / π_rollout, cap), without gradient; ones if cap is None."""
    if cap is None:
        return torch.ones_like(old_T)
    return (old_T - rollout_T).exp().clamp(max=cap).detach()


def kl_to_reference(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """Return the k3 estimate of KL(policy, reference) at each sampled token [T].

    exp(d) - d - 1 with d = reference - policy: unbiased and never negative.
    Reference: Schulman 2020, "Approximating KL divergence", k3.
    """
    difference_T = reference_T - logprobs_T
    return difference_T.exp() - difference_T - 1
