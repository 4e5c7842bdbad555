"""flash-linear-attention's kernels without its layers and models.

`import fla` tries its layers and models, which import transformers and with it whatever that finds (scikit-learn,
pandas, pyarrow): 4 of 10 s of processor time, and nothing of it is used here. fla goes without them where they are
not installed, so for the time of its import they are said not to be.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_NOT_USED_HERE = ("fla.layers", "fla.models")


@contextmanager
def without_models() -> Iterator[None]:
    """Import from fla, or what imports it, in this context; afterwards they can be imported as ever."""
    hidden = [name for name in _NOT_USED_HERE if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # what Python's import reads as: not there
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
