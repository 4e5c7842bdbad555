"""Chi-square test without a statistics library."""

import math


def statistic(counts: list[int], probabilities: list[float]) -> tuple[float, int]:
    """Return Pearson's statistic and its degrees of freedom; cells that expect fewer than 5 are pooled."""
    total = sum(counts)
    cells = sorted(zip(probabilities, counts))
    pooled, expected, observed = [], 0.0, 0
    for probability, count in cells:
        expected, observed = expected + probability * total, observed + count
        if expected >= 5:
            pooled.append((expected, observed))
            expected, observed = 0.0, 0
    last_expected, last_observed = pooled[-1]
    pooled[-1] = (last_expected + expected, last_observed + observed)
    return sum((c - e) ** 2 / e for e, c in pooled), len(pooled) - 1


def z_score(counts: list[int], probabilities: list[float]) -> float:
    """Return the counts' deviation from the probabilities in standard deviations (Wilson and Hilferty 1931)."""
    value, freedom = statistic(counts, probabilities)
    scale = 2 / (9 * freedom)
    return ((value / freedom) ** (1 / 3) - (1 - scale)) / math.sqrt(scale)
