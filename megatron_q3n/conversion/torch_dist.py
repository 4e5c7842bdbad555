"""megatron-core's checkpoint format ("torch_dist", torch.distributed.checkpoint), read and written chunk by chunk.

A data file is a sequence of torch.save records, each one chunk of a tensor; `.metadata` holds the file and offset of
every chunk. torch's own writer needs the whole state in memory, and its reader whole chunks (a stack of experts is one
chunk of 2 GiB and more). Here chunks are appended one at a time, and only the required rows of a chunk are read.
"""

import io
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_q3n.checkpoint.metadata_file import DAMAGE_ERRORS, METADATA, read_metadata
from megatron_q3n.config import UserError
from megatron_q3n.conversion.tensor_chunks import TensorChunk
from megatron_q3n.hf.param_mapping import Shape

BACKEND = "metadata.json"
# megatron-core's entry for objects that are no tensors: a list with one dict
# (megatron/core/dist_checkpointing/serialization.py)
_COMMON = "common_state/shard_0_1"
_COMMON_FILE = "__common_0.distcp"


@dataclass(frozen=True)
class Record:
    """A chunk in a data file; `position` is its first byte."""

    chunk: TensorChunk
    dtype: str
    position: int
    num_bytes: int

    def as_json(self) -> list[Any]:
        """Return the record as JSON-serializable values."""
        return [astuple(self.chunk), self.dtype, self.position, self.num_bytes]

    @classmethod
    def from_json(cls, values: list[Any]) -> "Record":
        """Undo `as_json`."""
        (key, *shapes), dtype, position, num_bytes = values
        global_shape, offset, shape = map(tuple, shapes)
        return cls(TensorChunk(key, global_shape, offset, shape), dtype, position, num_bytes)


def write_data(path: Path, chunks: Iterable[tuple[TensorChunk, Tensor]]) -> list[Record]:
    """Write a data file, one chunk after the other; return the records of the chunks."""
    records = []
    with path.open("wb") as file:
        for chunk, tensor in chunks:
            assert tuple(tensor.shape) == chunk.shape, chunk
            position = file.tell()
            # torch.save writes a tensor's whole storage, which for a view of a memory-mapped file is the file
            torch.save(tensor.clone(memory_format=torch.contiguous_format), file)
            dtype = str(tensor.dtype).removeprefix("torch.")
            records.append(Record(chunk, dtype, position, file.tell() - position))
    return records


def write_metadata(folder: Path, files: Mapping[str, Iterable[Record]]) -> None:
    """Write `.metadata` (the index of all chunks) and megatron-core's two small files beside the data files."""
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, records in files.items():
        for record in records:
            chunk = record.chunk
            if (entry := tensors.get(chunk.key)) is None:
                entry = tensors[chunk.key] = _empty_tensor(record)
            offset = torch.Size(chunk.offset)
            entry.chunks.append(ChunkStorageMetadata(offset, torch.Size(chunk.shape)))
            storage[MetadataIndex(chunk.key, offset)] = _StorageInfo(name, record.position, record.num_bytes)
    common = io.BytesIO()
    torch.save([{}], common)
    (folder / _COMMON_FILE).write_bytes(common.getvalue())
    tensors[_COMMON] = BytesStorageMetadata()
    storage[MetadataIndex(_COMMON)] = _StorageInfo(_COMMON_FILE, 0, len(common.getvalue()))
    metadata = Metadata(tensors, storage_data=storage, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    (folder / BACKEND).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


class SavedTensors:
    """Chunk-wise reader of the tensors of a checkpoint of any parallel layout.

    Raises: UserError if the checkpoint's `.metadata` cannot be read.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._folder = checkpoint
        metadata = read_metadata(checkpoint)
        self._tensors = metadata.state_dict_metadata
        self._storage = metadata.storage_data
        self._stored: dict[str, dict[Shape, TensorChunk]] = {}

    def check(self, chunk: TensorChunk) -> None:
        """Raise UserError if the checkpoint has no such tensor or it has another shape."""
        entry = self._tensors.get(chunk.key)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(
                f"{self._folder} has no tensor {chunk.key}, which its model section needs; use another checkpoint."
            )
        if tuple(entry.size) != chunk.global_shape:
            raise UserError(
                f"{self._folder}: {chunk.key} has shape {list(entry.size)}; its model section makes it "
                f"{list(chunk.global_shape)}. Use another checkpoint."
            )

    def read(self, chunk: TensorChunk) -> Tensor:
        """Read a chunk; memory holds it and the overlapping rows of one stored chunk.

        Raises: UserError if the checkpoint does not hold the whole chunk or a file is truncated.
        """
        result = torch.empty(chunk.shape, dtype=self._tensors[chunk.key].properties.dtype)
        filled = 0
        for stored in self._overlapping(chunk):
            low = [max(a, b) for a, b in zip(chunk.offset, stored.offset)]
            high = [min(a, b) for a, b in zip(_end(chunk), _end(stored))]
            rows = self._rows(stored, low[0] - stored.offset[0], high[0] - stored.offset[0])
            part = rows[(slice(None), *_slices(low, high, stored)[1:])]
            result[_slices(low, high, chunk)] = part
            filled += part.numel()
        if filled != result.numel():
            raise UserError(
                f"{self._folder} holds {filled} of the {result.numel()} values of {chunk.key} at {list(chunk.offset)}; "
                "the checkpoint is damaged, use another."
            )
        return result

    def _overlapping(self, chunk: TensorChunk) -> Iterator[TensorChunk]:
        stored = self._boxes(chunk.key)
        exact = stored.get(chunk.offset)
        for other in [exact] if exact and exact.shape == chunk.shape else stored.values():
            if all(a < d and c < b for a, b, c, d in zip(chunk.offset, _end(chunk), other.offset, _end(other))):
                yield other

    def _boxes(self, key: str) -> dict[Shape, TensorChunk]:
        if key not in self._stored:
            entry = self._tensors[key]
            self._stored[key] = {
                tuple(chunk.offsets): TensorChunk(key, tuple(entry.size), tuple(chunk.offsets), tuple(chunk.sizes))
                for chunk in entry.chunks
            }
        return self._stored[key]

    def _rows(self, stored: TensorChunk, first: int, last: int) -> Tensor:
        """Read rows `first` to `last` of a stored chunk; the rest of its record is not read."""
        location = self._storage[MetadataIndex(stored.key, stored.offset)]
        path = self._folder / location.relative_path
        try:
            with path.open("rb") as file:
                record = cast(IO[bytes], _create_file_view(file, location.offset, location.length))
                # a fake tensor has the shape, dtype and file offset of the values, without reading them
                with FakeTensorMode():
                    fake = torch.load(record, weights_only=True)
                assert fake.is_contiguous(), f"{stored.key} in {path}"
                start = fake.untyped_storage()._checkpoint_offset  # type: ignore[attr-defined]
                elements = fake.storage_offset() + first * fake.stride(0)
                file.seek(location.offset + start + elements * fake.element_size())
                rows = torch.empty((last - first, *stored.shape[1:]), dtype=fake.dtype)
                buffer = memoryview(rows.flatten().view(torch.uint8).numpy())
                num_read = file.readinto(buffer)
        except (OSError, *DAMAGE_ERRORS) as error:
            raise UserError(f"{path} cannot be read ({error}); use another checkpoint.") from None
        if num_read != len(buffer):
            raise UserError(f"{path} is truncated; the checkpoint is damaged, use another.")
        return rows


def _end(chunk: TensorChunk) -> Shape:
    return tuple(start + size for start, size in zip(chunk.offset, chunk.shape))


def _slices(low: list[int], high: list[int], chunk: TensorChunk) -> tuple[slice, ...]:
    return tuple(slice(a - start, b - start) for a, b, start in zip(low, high, chunk.offset))


def _empty_tensor(record: Record) -> TensorStorageMetadata:
    properties = TensorProperties.create_from_tensor(torch.empty(0, dtype=getattr(torch, record.dtype)))
    return TensorStorageMetadata(properties, torch.Size(record.chunk.global_shape), [])
