"""Names of data sources in metric names: distinct, and made of letters, digits, `_` and `-`."""

import re
from collections.abc import Iterable


def distinct_names(texts: Iterable[str]) -> tuple[str, ...]:
    """Return a distinct name for each text; the second "web" becomes "web_2"."""
    names: list[str] = []
    for text in texts:
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", text) or "source"
        number, chosen = 1, name
        while chosen in names:
            number += 1
            chosen = f"{name}_{number}"
        names.append(chosen)
    return tuple(names)
