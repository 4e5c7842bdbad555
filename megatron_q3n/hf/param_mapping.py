"""Parameter mapping between one megatron-core tensor and Hugging Face's tensors, and its name and shape checks."""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from megatron_q3n.config import UserError

HUGGING_FACE, MEGATRON = "Hugging Face", "megatron-core"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ParamMapping:
    """Bijection between one megatron-core tensor and one or more Hugging Face tensors.

    megatron, shape: name and shape of the megatron-core tensor. hf: names and shapes of the Hugging Face tensors.
    join: the Hugging Face tensors, in order -> the megatron-core tensor. split: the inverse of join.
    shift: megatron-core weight = Hugging Face weight + shift. stacked: name of the Hugging Face tensor that is equal to
    the megatron-core tensor, where a family publishes one (stacked experts).
    """

    megatron: str
    shape: Shape
    hf: dict[str, Shape]
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]
    shift: float = 0.0
    stacked: str | None = None

    def sources(self, available: Container[str]) -> dict[str, Shape]:
        """Return the tensors to read: the stacked one if available (transformers 5, some families), else `hf`."""
        if self.stacked is not None and self.stacked in available:
            return {self.stacked: self.shape}
        return self.hf

    def to_megatron(self, hf: Mapping[str, Tensor], gradients: bool = False) -> Tensor:
        """Return the megatron-core tensor; reads only the tensors of `sources` from `hf`.

        gradients: the tensors are gradients, to which the shift does not apply.
        Raises: UserError if a tensor is missing or has another shape.
        """
        sources = self.sources(hf)
        tensors = [_fetch(hf, name, shape) for name, shape in sources.items()]
        joined = self.join(tensors) if sources is self.hf else tensors[0]
        return joined if gradients else _shifted(joined, self.shift)

    def to_hf(self, tensor: Tensor, gradients: bool = False) -> dict[str, Tensor]:
        """Return the Hugging Face tensors, some of them views of the megatron-core tensor.

        Raises: UserError if the tensor has another shape.
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
    found_names, expected_names = set(found), set(expected)
    missing, unexpected = expected_names - found_names, found_names - expected_names
    if missing or unexpected:
        _refuse(side, sorted(missing), sorted(unexpected))


def _refuse(side: str, missing: list[str], unexpected: list[str]) -> NoReturn:
    kinds = {"missing": missing, "unexpected": unexpected}
    differences = "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for kind, names in kinds.items()
        if names
    )
    raise UserError(
        f"{side} weights do not fit the model section: {differences}. Set model.num_layers, mixer_pattern, "
        "num_moe_experts and mtp_num_layers to the checkpoint's, or give the checkpoint they describe."
    )


def _check_shape(side: str, name: str, tensor: Tensor, shape: Shape) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{side} weight {name} has shape {list(tensor.shape)}; the model section makes it "
            f"{list(shape)}. Set the model's sizes and numbers of heads to the checkpoint's."
        )
