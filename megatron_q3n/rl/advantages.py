"""From scores to advantages: how much better an answer was than its group's others. Pure functions.

Shapes: N samples; `group_N` names each one's group.
References: GRPO (arXiv 2402.03300, section 4.1.2), Dr. GRPO (arXiv 2503.20783, section 3), DAPO (arXiv
2503.14476, sections 3.2 and 3.4).
"""

from typing import Literal

import numpy as np

EPSILON = 1e-6  # so that a group without a difference gets 0 and not a division by 0


def group_advantages(rewards_N: np.ndarray, group_N: np.ndarray, scale: Literal["std", "none"]) -> np.ndarray:
    """Centre each group's rewards; with "std" divide them by their (population) standard deviation.

    Returns: fp64 [N].
    """
    rewards = np.asarray(rewards_N, np.float64)
    advantages = np.empty_like(rewards)
    for group in np.unique(group_N):
        mine = group_N == group
        centred = rewards[mine] - rewards[mine].mean()
        deviation = rewards[mine].std() + EPSILON if scale == "std" else 1.0
        advantages[mine] = centred / deviation
    return advantages


def overlong_penalties(lengths_N: np.ndarray, longest: int, buffer: int, penalty: float) -> np.ndarray:
    """Return what is added to the rewards of long answers: 0 up to longest - buffer, then falling to -penalty.

    Reference: DAPO, equation 13.
    """
    if buffer == 0:
        return np.zeros(len(lengths_N))
    into_buffer = (np.asarray(lengths_N, np.float64) - (longest - buffer)) / buffer
    return -penalty * np.clip(into_buffer, 0.0, 1.0)


def even_groups(rewards_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """Say for each sample whether its whole group got one reward, so that it teaches nothing."""
    even = np.empty(len(rewards_N), bool)
    for group in np.unique(group_N):
        mine = group_N == group
        even[mine] = np.ptp(rewards_N[mine]) == 0
    return even


def token_weights(
    lengths_N: np.ndarray, normalisation: Literal["sequence", "token", "constant"], longest: int
) -> np.ndarray:
    """Return the weight of each token of a sample in the loss of the batch; the loss is then a plain sum.

    sequence: 1 / (N · |y|), GRPO and GSPO; token: 1 / Σ|y|, DAPO; constant: 1 / (N · longest), Dr. GRPO.
    """
    lengths = np.asarray(lengths_N, np.float64)
    if normalisation == "sequence":
        return 1 / (len(lengths) * lengths)
    total = lengths.sum() if normalisation == "token" else len(lengths) * longest
    return np.full(len(lengths), 1 / total)
