"""The policy loss of every token, as pure functions of probabilities and advantages.

Log ratios are between the weights being trained and those at the start of the batch ("old"). GRPO takes
each token's own; GSPO the mean over its sequence, the logarithm of the geometric mean of the ratios, which
is one number for all its tokens. The clipped surrogate, the KL estimate and the correction for rollouts
drawn by another engine are the same for both. How tokens are weighed is `advantages.token_weights`.

Shapes: T tokens of a packed row; `sample_T` numbers the sample of each from 0, -1 where nothing counts.
References: PPO (arXiv 1707.06347, eq. 7), GRPO (arXiv 2402.03300, eq. 3-4), GSPO (arXiv 2507.18071, eq. 5-7),
truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL").
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLosses:
    """Losses of the tokens [T], without their weights, and what telemetry wants of them [T] (no gradient)."""

    loss_T: Tensor
    ratio_T: Tensor
    is_clipped_T: Tensor


def log_ratios(logprobs_T: Tensor, old_T: Tensor, sample_T: Tensor, kind: Literal["token", "sequence"]) -> Tensor:
    """Return each token's log importance ratio: its own, or its sequence's mean; 0 where nothing counts."""
    counts_T = sample_T >= 0
    own_T = torch.where(counts_T, logprobs_T - old_T, 0.0)
    if kind == "token":
        return own_T
    index_T = sample_T.clamp(min=0)
    num_samples = int(index_T.max()) + 1
    sums = own_T.new_zeros(num_samples).index_add(0, index_T, own_T)
    lengths = own_T.new_zeros(num_samples).index_add(0, index_T, counts_T.to(own_T.dtype))
    return torch.where(counts_T, (sums / lengths.clamp(min=1))[index_T], 0.0)


def clipped_surrogate(log_ratio_T: Tensor, advantage_T: Tensor, clip_low: float, clip_high: float) -> TokenLosses:
    """Return -min(ratio · A, clip(ratio, 1 - low, 1 + high) · A) of each token."""
    ratio_T = log_ratio_T.exp()
    plain_T = ratio_T * advantage_T
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantage_T
    is_clipped_T = (clipped_T < plain_T).detach()
    return TokenLosses(-torch.minimum(plain_T, clipped_T), ratio_T.detach(), is_clipped_T)


def truncated_importance(old_T: Tensor, rollout_T: Tensor, cap: float | None) -> Tensor:
    """Return min(π_old / π_rollout, cap) of each token, without gradient; ones where there is no cap."""
    if cap is None:
        return torch.ones_like(old_T)
    return (old_T - rollout_T).exp().clamp(max=cap).detach()


def kl_to_reference(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """Estimate KL(policy, reference) from each drawn token: exp(d) - d - 1 with d = reference - policy.

    Unbiased and never negative (Schulman 2020, "Approximating KL divergence", k3).
    """
    difference_T = reference_T - logprobs_T
    return difference_T.exp() - difference_T - 1
