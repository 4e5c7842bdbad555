"""Reader of `.metadata`, the pickled index of torch's distributed checkpoint format, which executes nothing.

torch reads the file with `pickle.load`, so a foreign checkpoint could run any code. Here the file must match its digest
in the manifest before it is unpickled; the unpickler constructs only the classes that the format consists of; and the
result is checked, since later code takes its shapes, paths and offsets for true. Damage of any kind is one message.

The unpickler is Python's own in Python, not in C: the one in C allocates 16 bytes for every number up to the largest
memo index in the file, so one changed byte could take 64 GiB. It reads about 15,000 chunks per second.
"""

import hashlib
import io
import pickle
import struct
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import _get_layout

from megatron_q3n.checkpoint import integrity
from megatron_q3n.config import UserError

METADATA = ".metadata"
# what damaged bytes raise in the unpickler and in the constructors that it calls, and in torch.load
DAMAGE_ERRORS = (
    *(pickle.UnpicklingError, struct.error, EOFError, ArithmeticError, LookupError, MemoryError),
    *(AssertionError, AttributeError, ImportError, RuntimeError, TypeError, ValueError),
)
_DATACLASSES: tuple[type, ...] = (
    *(Metadata, MetadataIndex, StorageMeta, TensorProperties, TensorStorageMetadata, BytesStorageMetadata),
    *(ChunkStorageMetadata, _StorageInfo),
)
# PosixPath: the folder that the checkpoint was written to, as some writers store it
_FUNCTIONS: tuple[Any, ...] = (torch.Size, _MEM_FORMAT_ENCODING, PosixPath, _get_layout)
_ALLOWED = {(part.__module__, part.__qualname__): part for part in (*_DATACLASSES, *_FUNCTIONS)}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# opcodes of other objects: instances by name, persistent and registered ones, buffers
_REFUSED_OPCODES = b"ioPQ\x82\x83\x84\x96\x97\x98"
_LOAD: dict[int, Any] = dict(pickle._Unpickler.dispatch)


def read_metadata(checkpoint: Path) -> Metadata:
    """Return a checkpoint's index of tensors, after comparing the file with the manifest.

    Raises: UserError if it is missing, damaged or holds anything but such an index.
    """
    path = checkpoint / METADATA
    manifest = integrity.read_manifest(checkpoint)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); use another checkpoint.") from None
    digest = manifest["digests"].get(METADATA) if integrity.has_digests(manifest) else None
    if integrity.has_digests(manifest) and hashlib.new(integrity.ALGORITHM, content).hexdigest() != digest:
        raise UserError(f"{path} does not match its digest; the checkpoint is damaged, use another.")
    try:
        metadata = parse(content)
    except DAMAGE_ERRORS as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {text}); the checkpoint is damaged, use another."
        ) from None
    if problem := _problem(metadata, manifest["files"]):
        raise UserError(f"{path} is not a checkpoint's index ({problem}); the checkpoint is damaged, use another.")
    return metadata


# loading reads it several times
@lru_cache(maxsize=1)
def parse(content: bytes) -> Any:
    """Return the object pickled in `content`; it may be of any of the allowed types.

    Raises: one of DAMAGE_ERRORS for anything else.
    """
    return _Unpickler(io.BytesIO(content)).load()


class _Unpickler(pickle._Unpickler):
    """Unpickler of the classes of the format. It calls nothing else and changes no class."""

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not a part of the format")
        return _ALLOWED[module, name]

    def _reduce(self) -> None:
        if not any(self.stack[-2] is allowed for allowed in _FUNCTIONS):
            raise pickle.UnpicklingError("it calls what is not a function of the format")
        _LOAD[pickle.REDUCE[0]](self)

    def _build(self) -> None:
        if type(self.stack[-2]) not in _DATACLASSES:
            raise pickle.UnpicklingError("it sets attributes of what is not an instance of the format")
        _LOAD[pickle.BUILD[0]](self)

    dispatch: ClassVar[dict[int, Any]] = {
        **{code: load for code, load in _LOAD.items() if code not in _REFUSED_OPCODES},
        pickle.REDUCE[0]: _reduce,
        pickle.BUILD[0]: _build,
    }


def _problem(metadata: Any, files: Mapping[str, int]) -> str | None:
    """Return why an unpickled object is not the index of a checkpoint with these files and sizes, or None."""
    if not isinstance(metadata, Metadata):
        return f"a {type(metadata).__name__}"
    entries, storage = vars(metadata).get("state_dict_metadata"), vars(metadata).get("storage_data")
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        return "no tables of tensors and places"
    if not isinstance(vars(metadata).get("storage_meta"), StorageMeta | None):
        return "a storage_meta of another type"
    for name, entry in entries.items():
        if not isinstance(name, str) or not (type(entry) is BytesStorageMetadata or _is_tensor_entry(entry)):
            return f"entry {name!r:.80} is no tensor"
    lengths: dict[tuple[str, Any], int] = {}
    for index, place in storage.items():
        if not _is_place(index, place, files):
            return f"{index!r:.80} has no place in the checkpoint's files"
        lengths[index.fqn, index.offset] = place.length
    return next((problem for name, entry in entries.items() if (problem := _chunk_problem(name, entry, lengths))), None)


def _is_tensor_entry(entry: Any) -> bool:
    if type(entry) is not TensorStorageMetadata:
        return False
    fields = vars(entry)
    properties, chunks = fields.get("properties"), fields.get("chunks")
    return (
        type(properties) is TensorProperties
        and isinstance(vars(properties).get("dtype"), torch.dtype)
        and isinstance(vars(properties).get("layout"), torch.layout)
        and _is_shape(fields.get("size"))
        and isinstance(chunks, list)
        and all(type(chunk) is ChunkStorageMetadata for chunk in chunks)
        and all(_is_shape(vars(chunk).get(name)) for chunk in chunks for name in ("offsets", "sizes"))
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, torch.Size) and all(size >= 0 for size in value)


def _is_place(index: Any, place: Any, files: Mapping[str, int]) -> bool:
    """Return whether a record lies within one of the checkpoint's files."""
    if type(index) is not MetadataIndex or type(place) is not _StorageInfo:
        return False
    fields = vars(place)
    name, first, length = (fields.get(field) for field in ("relative_path", "offset", "length"))
    return (
        isinstance(vars(index).get("fqn"), str)
        and (vars(index).get("offset") is None or _is_shape(index.offset))
        and isinstance(name, str)
        and name in files
        and not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
        and isinstance(first, int)
        and isinstance(length, int)
        and 0 <= first <= first + length <= files[name]
        and not fields.get("transform_descriptors")
    )


def _chunk_problem(name: str, entry: Any, lengths: Mapping[tuple[str, Any], int]) -> str | None:
    """Return why an entry's chunks cannot be what its records hold, or None."""
    if type(entry) is BytesStorageMetadata:
        return None if (name, None) in lengths else f"{name} has no record"
    for chunk in entry.chunks:
        length = lengths.get((name, chunk.offsets))
        if length is None or len(chunk.sizes) != len(entry.size) or len(chunk.offsets) != len(entry.size):
            return f"a chunk of {name} has no record or another rank"
        if length < prod(chunk.sizes) * entry.properties.dtype.itemsize:
            return f"a chunk of {name} is larger than its record"
        if any(first + size > whole for first, size, whole in zip(chunk.offsets, chunk.sizes, entry.size)):
            return f"a chunk of {name} is outside of its tensor"
    if sum(prod(chunk.sizes) for chunk in entry.chunks) < prod(entry.size):
        return f"{name} is larger than its chunks"
    return None
