"""Source weights: how often each item of a source occurs in one pass over a mix of sources."""

import numpy as np

from megatron_q3n.data.held_out import hash_fraction


def repeated(indices: list[int], weight: float, name: str) -> list[int]:
    """Return the items of a source for one pass: each `weight` times; of a fraction, a random part of at least one.

    The part depends on the name and the number of items, so it is the same in every process and run.
    """
    whole = int(weight)
    partial = round((weight - whole) * len(indices))
    if not whole and not partial and indices:
        partial = 1
    generator = np.random.default_rng(int(hash_fraction(name) * 2**32))
    chosen = sorted(generator.permutation(len(indices))[:partial].tolist())
    return indices * whole + [indices[position] for position in chosen]
