"""Checkpoints: complete or absent, verified before loading, resumable, and pruned.

    writer.py         asynchronous saving: snapshot, write, atomic rename
    reader.py         loading and resuming, with verification and fall-back to an older checkpoint
    state_dict.py     contents: megatron-core's sharded state dict of model, optimizer and random generators
    folders.py        folder names, atomic publishing, retention
    completed.py      record of the newest complete checkpoint, to notice that all are gone
    integrity.py      manifest (checkpoint.json) with a SHA-256 checksum of every file
    metadata_file.py  reading of `.metadata`, which executes nothing
    loading.py        megatron-core's loading with that reader
    architecture.py   compatibility of a checkpoint's weights with a model
    saved_tensors.py  tensors of a checkpoint, one by one
    weights.py        weights alone, for inference

folders, completed, integrity and architecture need neither torch nor megatron-core. The names of writer and reader are
imported on first use, so that tools inspect a checkpoint without the eight seconds of importing megatron-core.
"""

import importlib
from typing import TYPE_CHECKING, Any

from megatron_q3n.checkpoint.architecture import check_architecture
from megatron_q3n.checkpoint.completed import check_not_lost
from megatron_q3n.checkpoint.folders import find, newest_in, step_name
from megatron_q3n.checkpoint.integrity import write_manifest

if TYPE_CHECKING:
    from megatron_q3n.checkpoint.reader import Resumed, describe, load, resume
    from megatron_q3n.checkpoint.writer import Saver, save

__all__ = [
    "Resumed",
    "Saver",
    "check_architecture",
    "check_not_lost",
    "describe",
    "find",
    "load",
    "newest_in",
    "resume",
    "save",
    "step_name",
    "write_manifest",
]
_LAZY_NAMES = dict.fromkeys(("Resumed", "describe", "load", "resume"), "reader")
_LAZY_NAMES |= dict.fromkeys(("Saver", "save"), "writer")


def __getattr__(name: str) -> Any:
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY_NAMES[name]}"), name)
