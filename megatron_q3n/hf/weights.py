"""Safetensors folders, tensor by tensor: memory-mapped reading, and writing at precomputed offsets.

A tensor that is read is a view of a memory-mapped file and takes no memory until it is copied. Where a family stacks
its experts, one expert is still read by its own name, as a view of the stack. For writing, all shapes are known in
advance: a shard's header is written first, then tensors, or single experts of a stack, at their offsets in any order.
"""

import json
import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_q3n.config import UserError
from megatron_q3n.hf.param_mapping import HUGGING_FACE, ParamMapping, Shape, check_names

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# prefixes of multimodal checkpoints' vision part, which a text model does not have
VISION = ("model.visual.", "visual.")
_FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors")
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class ExpertSlice:
    """One expert's matrix ("gate", "up" or "down") in a stacked tensor [experts, rows, columns]."""

    stack: str
    expert: int
    part: str

    def rows(self, stacked_rows: int) -> slice:
        """Return the rows of this matrix within the expert: gate is the first half of a stack, up the second."""
        half = stacked_rows // 2
        return {"gate": slice(0, half), "up": slice(half, None), "down": slice(None)}[self.part]


def expert_slice(name: str) -> ExpertSlice | None:
    """Return the position of an expert's tensor in the stacked format; None for other tensors."""
    if not (match := _EXPERT.fullmatch(name)):
        return None
    stack = "down_proj" if match["part"] == "down" else "gate_up_proj"
    return ExpertSlice(f"{match['experts']}.{stack}", int(match["expert"]), match["part"])


class PublishedWeights(Mapping[str, Tensor]):
    """The tensors of a folder by name, each a view of a memory-mapped file.

    Raises: UserError if a shard is missing, truncated, or lacks a tensor that the index lists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {name: _open(folder / name) for name in _shards(folder)}
        # safe_open is no Mapping: it has keys() only
        self._file_of = {name: file for file, shard in self._files.items() for name in shard.keys()}  # noqa: SIM118
        for name, file in _index(folder).items():
            if self._file_of.get(name) != file:
                raise UserError(f"{folder / file} lacks {name}, which {INDEX} lists for it; download it again.")

    def __getitem__(self, name: str) -> Tensor:
        if name in self._file_of:
            return self._files[self._file_of[name]].get_tensor(name)
        expert = expert_slice(name)
        if expert is None or expert.stack not in self._file_of:
            raise KeyError(name)
        stack = self[expert.stack]
        return stack[expert.expert, expert.rows(stack.shape[1])]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: object) -> bool:
        # False for single experts of a stack: `ParamMapping.sources` relies on it
        return name in self._file_of

    def shape(self, name: str) -> Shape:
        """Return a stored tensor's shape without touching its data."""
        return tuple(self._files[self._file_of[name]].get_slice(name).get_shape())

    def dtype_name(self, name: str) -> str:
        """Return a stored tensor's dtype in the notation of safetensors, e.g. BF16."""
        return self._files[self._file_of[name]].get_slice(name).get_dtype()

    def sizes_bytes(self) -> dict[str, int]:
        """Return the size of every shard."""
        return {name: (self.folder / name).stat().st_size for name in self._files}

    def check(self, table: Iterable[ParamMapping], ignored: Container[str] = ()) -> None:
        """Compare names, shapes and dtypes with the parameter mappings, before the conversion starts.

        ignored: names of tensors that may be there and are not read.

        Raises: UserError naming the first missing or unexpected tensor, wrong shape or unsupported dtype.
        """
        expected = {name: shape for mapping in table for name, shape in mapping.sources(self).items()}
        found = (name for name in self if not name.startswith(VISION) and name not in ignored)
        check_names(HUGGING_FACE, found, expected)
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise UserError(
                    f"{HUGGING_FACE} weight {name} has shape {list(self.shape(name))}; "
                    f"{CONFIG} makes it {list(shape)}. The two files are not of one model."
                )
            if self.dtype_name(name) not in DTYPES:
                raise UserError(
                    f"{HUGGING_FACE} weight {name} is stored as {self.dtype_name(name)}; it can be one of "
                    f"{', '.join(DTYPES)}. Use the model's unquantized release."
                )


@dataclass(frozen=True)
class TensorSlot:
    """A tensor in a shard; `start` is its first byte in the file."""

    shape: Shape
    dtype: torch.dtype
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A safetensors file to be written."""

    name: str
    header: bytes
    slots: dict[str, TensorSlot]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(slot.num_bytes for slot in self.slots.values())


def plan_shards(tensors: Mapping[str, tuple[Shape, torch.dtype]], max_bytes: int) -> list[Shard]:
    """Distribute tensors over files of at most `max_bytes` of data, in order, at least one tensor per file."""
    groups: list[dict[str, tuple[Shape, torch.dtype]]] = [{}]
    filled = 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape, dtype
        filled += size
    return [
        _shard(f"model-{number:05}-of-{len(groups):05}.safetensors", group) for number, group in enumerate(groups, 1)
    ]


def index_of(shards: Iterable[Shard]) -> dict[str, Any]:
    """Return the content of model.safetensors.index.json: the shard of every tensor."""
    slots = {name: (shard.name, slot) for shard in shards for name, slot in shard.slots.items()}
    total = sum(slot.num_bytes for _, slot in slots.values())
    return {"metadata": {"total_size": total}, "weight_map": {name: file for name, (file, _) in sorted(slots.items())}}


class ShardWriter:
    """Writer of one shard; every tensor must be written before it is closed."""

    def __init__(self, path: Path, shard: Shard) -> None:
        self._shard = shard
        self.num_written = len(shard.header)
        self._file = path.open("wb", buffering=0)
        self._file.write(shard.header)
        self._file.truncate(shard.num_bytes)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, or one expert's slice of a stacked tensor, if it belongs to this shard."""
        expert = expert_slice(name)
        if name in self._shard.slots:
            slot, first = self._shard.slots[name], 0
        elif expert is not None and expert.stack in self._shard.slots:
            slot = self._shard.slots[expert.stack]
            first_row = expert.rows(slot.shape[1]).start or 0
            first = (expert.expert * slot.shape[1] + first_row) * slot.shape[2]
        else:
            return
        data = tensor.to(slot.dtype).contiguous().flatten().view(torch.uint8).numpy()
        self._file.seek(slot.start + first * slot.dtype.itemsize)
        view = memoryview(data)
        # an unbuffered write may write fewer bytes than requested
        while view:
            view = view[self._file.write(view) :]
        self.num_written += len(data)

    def close(self) -> None:
        """Close the complete file."""
        assert self.num_written == self._shard.num_bytes, self._shard.name
        self._file.close()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: UserError if the file is missing or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a Hugging Face model folder, which has one.") from None
    # RecursionError: nested too deeply
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; download it again.")
    return content


def _index(folder: Path) -> dict[str, str]:
    """Return the shard of every tensor as the index lists it; an empty table without an index.

    Raises: UserError for an index without such a table, or with a shard that is not a file name: a path may lead out of
        the folder.
    """
    path = folder / INDEX
    if not path.is_file():
        return {}
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict):
        raise UserError(f"{path} has no object weight_map, which names the file of every tensor; download it again.")
    for name, shard in table.items():
        if not isinstance(shard, str) or not _FILE_NAME.fullmatch(shard):
            raise UserError(
                f"{path} lists {shard!r:.200} for {name}, which is not the name of a safetensors file in this folder. "
                "Use another copy of the model."
            )
    return table


def _shards(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        return sorted(set(_index(folder).values()))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise UserError(f"{folder} has neither {INDEX} nor {SINGLE}; give a Hugging Face model folder.")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing, and {INDEX} lists it; download it.") from None
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged ({error}); download it again.") from None


def _shard(name: str, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> Shard:
    # wide dtypes first, so that every tensor is aligned to its item size
    ordered = sorted(tensors.items(), key=lambda item: -item[1][1].itemsize)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for tensor, (shape, dtype) in ordered:
        starts[tensor], start = end, end
        end += math.prod(shape) * dtype.itemsize
        entries[tensor] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    slots = {tensor: TensorSlot(shape, dtype, len(header) + starts[tensor]) for tensor, (shape, dtype) in ordered}
    return Shard(name, header, slots)
