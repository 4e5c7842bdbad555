"""One row of the table between Hugging Face's tensors and megatron-core's, and what is said when they do not fit."""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from megatron_q3n.config import UserError

HUGGING_FACE, MEGATRON = "Hugging Face", "megatron-core"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """How one megatron-core tensor is made of published ones, and they of it."""

    megatron: str
    shape: Shape  # of the megatron-core tensor
    hf: dict[str, Shape]  # the published tensors it is made of, in order
    join: Callable[[list[Tensor]], Tensor]  # published, in order -> megatron-core
    split: Callable[[Tensor], list[Tensor]]  # and back
    shift: float = 0.0  # megatron-core weight = published weight + shift
    stacked: str | None = None  # the name of the megatron-core tensor where it is published whole

    def sources(self, available: Container[str]) -> dict[str, Shape]:
        """Say which tensors to read of those there are: one by one, or stacked as transformers 5
        holds experts in memory and some families publish them."""
        if self.stacked is not None and self.stacked in available:
            return {self.stacked: self.shape}
        return self.hf

    def to_megatron(self, hf: Mapping[str, Tensor], gradients: bool = False) -> Tensor:
        """Make the megatron-core tensor, reading of `hf` only what `sources` says.

        Raises: UserError if a tensor is missing or of another shape.
        """
        sources = self.sources(hf)
        tensors = [_fetch(hf, name, shape) for name, shape in sources.items()]
        joined = self.join(tensors) if sources is self.hf else tensors[0]
        return joined if gradients else _shifted(joined, self.shift)

    def to_hf(self, tensor: Tensor, gradients: bool = False) -> dict[str, Tensor]:
        """Make the published tensors, some of them views of the megatron-core one.

        Raises: UserError if it is of another shape.
        """
        _check_shape(MEGATRON, self.megatron, tensor, self.shape)
        unshifted = tensor if gradients else _shifted(tensor, -self.shift)
        return dict(zip(self.hf, self.split(unshifted), strict=True))


def _shifted(tensor: Tensor, shift: float) -> Tensor:
    if not shift:
        return tensor
    return (tensor if tensor.dtype == torch.float64 else tensor.float()) + shift


def _fetch(tensors: Mapping[str, Tensor], name: str, shape: Shape) -> Tensor:
    if name not in tensors:
        _refuse(HUGGING_FACE, missing=[name], unexpected=[])
    _check_shape(HUGGING_FACE, name, tensors[name], shape)
    return tensors[name]


def check_names(side: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise UserError if names are missing or unexpected, naming the first of them."""
    there, wanted = set(found), set(expected)
    missing, unexpected = wanted - there, there - wanted
    if missing or unexpected:
        _refuse(side, sorted(missing), sorted(unexpected))


def _refuse(side: str, missing: list[str], unexpected: list[str]) -> NoReturn:
    kinds = {"missing": missing, "unexpected": unexpected}
    found = "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for kind, names in kinds.items()
        if names
    )
    raise UserError(
        f"{side} weights do not fit the model section: {found}. Set model.num_layers, mixer_pattern, "
        "num_moe_experts and mtp_num_layers to the checkpoint's, or give the checkpoint they describe."
    )


def _check_shape(side: str, name: str, tensor: Tensor, shape: Shape) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{side} weight {name} has shape {list(tensor.shape)}; the model section makes it "
            f"{list(shape)}. Set the model's sizes and numbers of heads to the checkpoint's."
        )
