"""The weights a run began with, kept in host memory and put in the model's place when they are asked."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_q3n.training.state import TrainState


class Reference:
    """A copy of the present weights of this rank."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._weights = self._copies()

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Run with the reference's weights, and put the policy's back."""
        policy = self._copies()
        self._put(self._weights)
        try:
            yield
        finally:
            self._put(policy)

    def _copies(self) -> list[Tensor]:
        self._state.gather_parameters()
        return [parameter.detach().to("cpu", copy=True) for parameter in self._parameters()]

    def _put(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self._parameters(), weights, strict=True):
                parameter.copy_(weight)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for model in self._state.models for p in model.parameters()]
