"""megatron-core's checkpoint format ("torch_dist"), box by box: what torch.distributed.checkpoint writes to disk.

A data file is a row of torch.save records, each one box of a tensor; `.metadata` says which box of
which tensor lies where. torch's own writer wants the whole state at once and its reader whole
boxes, of which a stack of experts is one: 2 GiB and more. So boxes are appended here one at a time,
and read by the rows that are needed.
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
from torch.distributed.checkpoint import FileSystemReader
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

from megatron_q3n.config import UserError
from megatron_q3n.conversion.pieces import Box
from megatron_q3n.hf.rule import Shape

METADATA, BACKEND = ".metadata", "metadata.json"
# where megatron-core keeps what is no tensor; a list with one dict (serialization.py)
_COMMON = "common_state/shard_0_1"
_COMMON_FILE = "__common_0.distcp"


@dataclass(frozen=True)
class Record:
    """A box in a data file."""

    box: Box
    dtype: str
    position: int  # byte in the file
    num_bytes: int

    def as_json(self) -> list[Any]:
        """Return it as plain values."""
        return [astuple(self.box), self.dtype, self.position, self.num_bytes]

    @classmethod
    def from_json(cls, values: list[Any]) -> "Record":
        """Undo `as_json`."""
        (key, *shapes), dtype, position, num_bytes = values
        whole, offset, shape = map(tuple, shapes)
        return cls(Box(key, whole, offset, shape), dtype, position, num_bytes)


def write_data(path: Path, boxes: Iterable[tuple[Box, Tensor]]) -> list[Record]:
    """Write a data file, one box after the other."""
    records = []
    with path.open("wb") as file:
        for box, tensor in boxes:
            assert tuple(tensor.shape) == box.shape, box
            position = file.tell()
            # torch.save writes a tensor's whole storage, which for a view of a mapped file is the file
            torch.save(tensor.clone(memory_format=torch.contiguous_format), file)
            dtype = str(tensor.dtype).removeprefix("torch.")
            records.append(Record(box, dtype, position, file.tell() - position))
    return records


def write_metadata(folder: Path, files: Mapping[str, Iterable[Record]]) -> None:
    """Write what makes data files a checkpoint of megatron-core: the map of all boxes."""
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, records in files.items():
        for record in records:
            box = record.box
            if (known := tensors.get(box.key)) is None:
                known = tensors[box.key] = _empty_tensor(record)
            offset = torch.Size(box.offset)
            known.chunks.append(ChunkStorageMetadata(offset, torch.Size(box.shape)))
            places[MetadataIndex(box.key, offset)] = _StorageInfo(name, record.position, record.num_bytes)
    common = io.BytesIO()
    torch.save([{}], common)
    (folder / _COMMON_FILE).write_bytes(common.getvalue())
    tensors[_COMMON] = BytesStorageMetadata()
    places[MetadataIndex(_COMMON)] = _StorageInfo(_COMMON_FILE, 0, len(common.getvalue()))
    metadata = Metadata(tensors, storage_data=places, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    (folder / BACKEND).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


class SavedTensors:
    """The tensors of a checkpoint, of whatever layout, by box.

    Raises: UserError if the checkpoint's map cannot be read.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._folder = checkpoint
        try:
            metadata = FileSystemReader(checkpoint).read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise UserError(
                f"{checkpoint / METADATA} cannot be read ({error}); the checkpoint is damaged, use another."
            ) from None
        self._tensors = metadata.state_dict_metadata
        self._places = metadata.storage_data
        self._stored: dict[str, dict[Shape, Box]] = {}

    def check(self, box: Box) -> None:
        """Raise UserError if there is no such tensor or it has another shape."""
        entry = self._tensors.get(box.key)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{self._folder} has no tensor {box.key}, which its model section asks for.")
        if tuple(entry.size) != box.whole:
            raise UserError(
                f"{self._folder}: {box.key} has shape {list(entry.size)}; its model section makes it {list(box.whole)}."
            )

    def read(self, box: Box) -> Tensor:
        """Read a box, holding no more than it and the rows of one stored box that it touches.

        Raises: UserError if the checkpoint does not hold all of it or a file is cut short.
        """
        result = torch.empty(box.shape, dtype=self._tensors[box.key].properties.dtype)
        filled = 0
        for stored in self._overlapping(box):
            low = [max(a, b) for a, b in zip(box.offset, stored.offset)]
            high = [min(a, b) for a, b in zip(_end(box), _end(stored))]
            rows = self._rows(stored, low[0] - stored.offset[0], high[0] - stored.offset[0])
            part = rows[(slice(None), *_slices(low, high, stored)[1:])]
            result[_slices(low, high, box)] = part
            filled += part.numel()
        if filled != result.numel():
            raise UserError(
                f"{self._folder} holds {filled} of the {result.numel()} values of {box.key} at {list(box.offset)}; "
                "the checkpoint is damaged, use another."
            )
        return result

    def _overlapping(self, box: Box) -> Iterator[Box]:
        stored = self._boxes(box.key)
        exact = stored.get(box.offset)
        for other in [exact] if exact and exact.shape == box.shape else stored.values():
            if all(a < d and c < b for a, b, c, d in zip(box.offset, _end(box), other.offset, _end(other))):
                yield other

    def _boxes(self, key: str) -> dict[Shape, Box]:
        if key not in self._stored:
            entry = self._tensors[key]
            self._stored[key] = {
                tuple(chunk.offsets): Box(key, tuple(entry.size), tuple(chunk.offsets), tuple(chunk.sizes))
                for chunk in entry.chunks
            }
        return self._stored[key]

    def _rows(self, stored: Box, first: int, last: int) -> Tensor:
        """Read some rows of a stored box; the rest of its record is not touched."""
        place = self._places[MetadataIndex(stored.key, stored.offset)]
        path = self._folder / place.relative_path
        try:
            with path.open("rb") as file:
                record = cast(IO[bytes], _create_file_view(file, place.offset, place.length))
                with FakeTensorMode():  # tells form and position of the values, reads none
                    form = torch.load(record, weights_only=True)
                assert form.is_contiguous(), f"{stored.key} in {path}"
                start = form.untyped_storage()._checkpoint_offset  # type: ignore[attr-defined]
                elements = form.storage_offset() + first * form.stride(0)
                file.seek(place.offset + start + elements * form.element_size())
                rows = torch.empty((last - first, *stored.shape[1:]), dtype=form.dtype)
                wanted = memoryview(rows.flatten().view(torch.uint8).numpy())
                found = file.readinto(wanted)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"{path} cannot be read ({error}); use another checkpoint.") from None
        if found != len(wanted):
            raise UserError(f"{path} is cut short; the checkpoint is damaged, use another.")
        return rows


def _end(box: Box) -> Shape:
    return tuple(start + size for start, size in zip(box.offset, box.shape))


def _slices(low: list[int], high: list[int], box: Box) -> tuple[slice, ...]:
    return tuple(slice(a - start, b - start) for a, b, start in zip(low, high, box.offset))


def _empty_tensor(record: Record) -> TensorStorageMetadata:
    properties = TensorProperties.create_from_tensor(torch.empty(0, dtype=getattr(torch, record.dtype)))
    return TensorStorageMetadata(properties, torch.Size(record.box.whole), [])
