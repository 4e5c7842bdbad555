"""Group-relative advantages and token weights of the policy loss, as pure functions of scores and lengths.

Shapes: N samples; `group_N` holds each sample's group number, `is_scored_N` whether its reward says something about it.
A sample whose scoring failed has advantage 0, and is no part of its group's mean, deviation and variance.
References: GRPO (arXiv 2402.03300, section 4.1.2), Dr. GRPO (arXiv 2503.20783, section 3), DAPO (arXiv
2503.14476, sections 3.2 and 3.4).
"""

from typing import Literal

import numpy as np

# a group whose rewards are equal gets advantage 0 instead of a division by 0
EPSILON = 1e-6


def group_advantages(
    rewards_N: np.ndarray, group_N: np.ndarray, scale: Literal["std", "none"], is_scored_N: np.ndarray
) -> np.ndarray:
    """Subtract each group's mean reward; with "std" also divide by the group's (population) standard deviation.

    Returns: fp64 [N].
    """
    rewards_N = np.asarray(rewards_N, np.float64)
    advantages_N = np.zeros_like(rewards_N)
    for group in np.unique(group_N[is_scored_N]):
        in_group_N = (group_N == group) & is_scored_N
        centered = rewards_N[in_group_N] - rewards_N[in_group_N].mean()
        deviation = rewards_N[in_group_N].std() + EPSILON if scale == "std" else 1.0
        advantages_N[in_group_N] = centered / deviation
    return advantages_N


def overlong_penalties(lengths_N: np.ndarray, max_tokens: int, buffer_tokens: int, penalty: float) -> np.ndarray:
    """Return the soft overlong punishment: 0 up to max_tokens - buffer_tokens, then falling linearly to -penalty.

    Reference: DAPO, equation 13.
    """
    if buffer_tokens == 0:
        return np.zeros(len(lengths_N))
    into_buffer_N = (np.asarray(lengths_N, np.float64) - (max_tokens - buffer_tokens)) / buffer_tokens
    return -penalty * np.clip(into_buffer_N, 0.0, 1.0)


def zero_variance_groups(rewards_N: np.ndarray, group_N: np.ndarray, is_scored_N: np.ndarray) -> np.ndarray:
    """Return for each sample whether the scored rewards of its group are equal, or there are none. Bool [N]."""
    is_zero_variance_N = np.ones(len(rewards_N), bool)
    for group in np.unique(group_N[is_scored_N]):
        in_group_N = group_N == group
        is_zero_variance_N[in_group_N] = np.ptp(rewards_N[in_group_N & is_scored_N]) == 0
    return is_zero_variance_N


def token_weights(
    lengths_N: np.ndarray, normalisation: Literal["sequence", "token", "constant"], max_tokens: int
) -> np.ndarray:
    """Return the weight of each token of a sample in the batch's loss, which is then a plain weighted sum. fp64 [N].

    sequence: 1 / (N · |y|), GRPO and GSPO; token: 1 / Σ|y|, DAPO; constant: 1 / (N · max_tokens), Dr. GRPO.
    """
    lengths_N = np.asarray(lengths_N, np.float64)
    if normalisation == "sequence":
        return 1 / (len(lengths_N) * lengths_N)
    total = lengths_N.sum() if normalisation == "token" else len(lengths_N) * max_tokens
    return np.full(len(lengths_N), 1 / total)
