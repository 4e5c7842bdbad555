"""Reference policy of the KL penalty: the initial weights in host memory, swapped into the model when needed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_q3n.training.state import TrainState


class ReferencePolicy:
    """A copy, on the CPU, of the weights that this rank's model has when this object is made."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._weights = self._copy_weights()

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[None]:
        """Give the model the reference weights, and restore the policy's weights afterwards."""
        policy_weights = self._copy_weights()
        self._load_weights(self._weights)
        try:
            yield
        finally:
            self._load_weights(policy_weights)

    def _copy_weights(self) -> list[Tensor]:
        self._state.gather_parameters()
        return [parameter.detach().to("cpu", copy=True) for parameter in self._parameters()]

    def _load_weights(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self._parameters(), weights, strict=True):
                parameter.copy_(weight)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for model in self._state.models for p in model.parameters()]
