"""Inputs and gradients of the start-up checks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NUM_TOKENS = 192
Results = Sequence[Tensor]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return normal random numbers on the GPU, the same for the same shape."""
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def random_matrix(*shape: int) -> Tensor:
    """Return a random weight with variance 1 / input width."""
    return shape[-1] ** -0.5 * random(*shape)


def with_gradients(run: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the output of `run`, and the gradients of each input for a random upstream gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = run(*leaves)
    upstream = random(*output.shape, dtype=output.dtype)
    return [output, *torch.autograd.grad(output, leaves, upstream)]
