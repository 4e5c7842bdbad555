"""Folders of safetensors, tensor by tensor: reading maps the files, writing knows each byte's place first.

A tensor that is read is a view of a mapped file: it costs no memory until somebody copies it. Where
a family stacks its experts, one expert is still asked for by its own name and is a view of the stack.
For writing, all shapes are known in advance, so a shard's header is written first and tensors, or
single experts of a stack, go to their place in any order.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_q3n.config import UserError
from megatron_q3n.hf.rule import HUGGING_FACE, Rule, Shape, check_names

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
VISION = ("model.visual.", "visual.")  # of multimodal checkpoints; no part of a text model
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Placed:
    """Where one expert's matrix lies in a stack [experts, rows, columns]."""

    stack: str
    expert: int
    part: str  # gate, up or down

    def rows(self, stacked_rows: int) -> slice:
        """Say which rows of the stack are this expert's: gate and up share it half and half."""
        half = stacked_rows // 2
        return {"gate": slice(0, half), "up": slice(half, None), "down": slice(None)}[self.part]


def placed(name: str) -> Placed | None:
    """Say where an expert's tensor of this name would lie, were it stacked; None for all others."""
    if not (match := _EXPERT.fullmatch(name)):
        return None
    stack = "down_proj" if match["part"] == "down" else "gate_up_proj"
    return Placed(f"{match['experts']}.{stack}", int(match["expert"]), match["part"])


class PublishedWeights(Mapping[str, Tensor]):
    """The tensors of a folder by name, each a view of a mapped file.

    Raises: UserError if a shard is missing, cut short, or lacks what the index says it holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {name: _open(folder / name) for name in _shards(folder)}
        self._where = {name: file for file, opened in self._files.items() for name in opened.keys()}  # noqa: SIM118 (safe_open is no mapping)
        for name, file in _index(folder).items():
            if self._where.get(name) != file:
                raise UserError(f"{folder / file} lacks {name}, which {INDEX} says it holds; copy it anew.")

    def __getitem__(self, name: str) -> Tensor:
        if name in self._where:
            return self._files[self._where[name]].get_tensor(name)
        place = placed(name)
        if place is None or place.stack not in self._where:
            raise KeyError(name)
        stack = self[place.stack]
        return stack[place.expert, place.rows(stack.shape[1])]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where  # and not the experts of a stack: `Rule.sources` asks this

    def shape(self, name: str) -> Shape:
        """Return a stored tensor's shape without touching its data."""
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def dtype_name(self, name: str) -> str:
        """Return a stored tensor's format as safetensors spells it, e.g. BF16."""
        return self._files[self._where[name]].get_slice(name).get_dtype()

    def sizes_bytes(self) -> dict[str, int]:
        """Return the size of every shard."""
        return {name: (self.folder / name).stat().st_size for name in self._files}

    def check(self, table: Iterable[Rule]) -> None:
        """Compare names, shapes and formats with the table, before anything is converted.

        Raises: UserError naming the first of what is missing, unexpected, misshapen or quantised.
        """
        wanted = {name: shape for rule in table for name, shape in rule.sources(self).items()}
        check_names(HUGGING_FACE, (name for name in self if not name.startswith(VISION)), wanted)
        for name, shape in wanted.items():
            if self.shape(name) != shape:
                raise UserError(
                    f"{HUGGING_FACE} weight {name} has shape {list(self.shape(name))}; "
                    f"{CONFIG} makes it {list(shape)}. The two files are not of one model."
                )
            if self.dtype_name(name) not in DTYPES:
                raise UserError(
                    f"{HUGGING_FACE} weight {name} is stored as {self.dtype_name(name)}; it can be one of "
                    f"{', '.join(DTYPES)}. Take the model's unquantised release."
                )


@dataclass(frozen=True)
class Slot:
    """A tensor's place in a shard."""

    shape: Shape
    dtype: torch.dtype
    start: int  # byte in the file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A safetensors file to be written."""

    name: str
    header: bytes
    slots: dict[str, Slot]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(slot.num_bytes for slot in self.slots.values())


def plan_shards(tensors: Mapping[str, tuple[Shape, torch.dtype]], max_bytes: int) -> list[Shard]:
    """Share tensors out over files of at most so many bytes of data, in order, one at least per file."""
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
    """Make the content of the index that says which shard holds which tensor."""
    slots = {name: (shard.name, slot) for shard in shards for name, slot in shard.slots.items()}
    total = sum(slot.num_bytes for _, slot in slots.values())
    return {"metadata": {"total_size": total}, "weight_map": {name: file for name, (file, _) in sorted(slots.items())}}


class ShardWriter:
    """Writes one shard; every tensor must have been put before it is closed."""

    def __init__(self, path: Path, shard: Shard) -> None:
        self._shard = shard
        self.num_written = len(shard.header)
        self._file = path.open("wb", buffering=0)
        self._file.write(shard.header)
        self._file.truncate(shard.num_bytes)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, or one expert's part of a stack, if it belongs to this shard."""
        place = placed(name)
        if name in self._shard.slots:
            slot, first = self._shard.slots[name], 0
        elif place is not None and place.stack in self._shard.slots:
            slot = self._shard.slots[place.stack]
            rows = place.rows(slot.shape[1]).start or 0
            first = (place.expert * slot.shape[1] + rows) * slot.shape[2]
        else:
            return
        data = tensor.to(slot.dtype).contiguous().flatten().view(torch.uint8).numpy()
        self._file.seek(slot.start + first * slot.dtype.itemsize)
        view = memoryview(data)
        while view:  # an unbuffered write may take less than it is given
            view = view[self._file.write(view) :]
        self.num_written += len(data)

    def close(self) -> None:
        """Close the file, now whole."""
        assert self.num_written == self._shard.num_bytes, self._shard.name
        self._file.close()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: UserError if the file is missing or is none.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a Hugging Face model folder has one.") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); copy it anew.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; copy it anew.")
    return content


def _index(folder: Path) -> dict[str, str]:
    return read_json(folder / INDEX).get("weight_map", {}) if (folder / INDEX).is_file() else {}


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
        raise UserError(f"{path} is missing, and {INDEX} names it; copy it to its place.") from None
    except SafetensorError as error:
        raise UserError(f"{path} is cut short or damaged ({error}); copy it anew.") from None


def _shard(name: str, tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> Shard:
    # wide formats first, so that every tensor is aligned to its own
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
    slots = {tensor: Slot(shape, dtype, len(header) + starts[tensor]) for tensor, (shape, dtype) in ordered}
    return Shard(name, header, slots)
