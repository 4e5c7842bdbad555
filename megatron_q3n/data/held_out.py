"""Held-out share of a set of texts by the hash of each text: the same in every run, and never part of equal texts."""

import hashlib
from collections.abc import Sequence


def hash_fraction(text: str) -> float:
    """Return a hash of a text, uniform in [0, 1); it decides the split of the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def held_out_mask(fractions: Sequence[float], share: float, most: int | None = None) -> list[bool]:
    """Return which texts are held out, given the hash of each in [0, 1) (`hash_fraction`).

    A text is held out if its hash is below the share. If there is none, as in small sets, it is the one with the
    smallest hash; `most` limits the number of distinct texts, and one always remains. Texts that are all equal cannot
    be split: none is held out then.
    """
    distinct = sorted(set(fractions))
    below = [fraction for fraction in distinct if fraction < share] or distinct[:1]
    border = min(len(below), len(distinct) - 1, len(distinct) if most is None else most)
    chosen = set(below[:border])
    return [fraction in chosen for fraction in fractions]
