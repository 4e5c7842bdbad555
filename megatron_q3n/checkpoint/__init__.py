"""Checkpoints: complete or absent, verified before they are trusted, found again, and bounded in number.

`writer` saves, `reader` loads, `content` says what is in a checkpoint, `folders` names, publishes and
prunes, `integrity` proves one whole, `architecture` says whether it fits a model. The last three need
neither torch nor megatron-core, and so the names of the others are fetched on first use: tools look
into a checkpoint without the eight seconds that importing megatron-core takes.
"""

import importlib
from typing import TYPE_CHECKING, Any

from megatron_q3n.checkpoint.architecture import check_architecture
from megatron_q3n.checkpoint.folders import find, newest_in, step_name
from megatron_q3n.checkpoint.integrity import seal

if TYPE_CHECKING:
    from megatron_q3n.checkpoint.reader import Resumed, describe, load, resume
    from megatron_q3n.checkpoint.writer import Saver, save

__all__ = [
    "Resumed",
    "Saver",
    "check_architecture",
    "describe",
    "find",
    "load",
    "newest_in",
    "resume",
    "save",
    "seal",
    "step_name",
]
_HOMES = dict.fromkeys(("Resumed", "describe", "load", "resume"), "reader")
_HOMES |= dict.fromkeys(("Saver", "save"), "writer")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
