"""Import of flash-linear-attention's kernels without its layers and models.

`import fla` also imports its layers and models if they are installed. These import transformers, which imports
scikit-learn, pandas and pyarrow: 4 of 10 s of CPU time, for modules that are not used here. So they are hidden during
the import.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_NOT_USED_HERE = ("fla.layers", "fla.models")


@contextmanager
def without_models() -> Iterator[None]:
    """Hide fla.layers and fla.models from imports inside this context; afterwards they can be imported as usual."""
    hidden = [name for name in _NOT_USED_HERE if name not in sys.modules]
    for name in hidden:
        # Python's import system treats None as "not found"
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
