"""The start-up check's part for a sublayer's head and for what stands before attention; and what checks are made of.

Verdicts are qualification.py's.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_q3n.config import RunConfig
from megatron_q3n.kernels import residual_norm
from megatron_q3n.kernels.attention import qkv_norm_rope

_TOKENS = 192
Results = Sequence[Tensor]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return normal numbers on the GPU, the same for the same shape."""
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def with_gradients(run: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return what `run` makes of the inputs, and the gradients of each for some gradient of that."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = run(*leaves)
    upstream = random(*output.shape, dtype=output.dtype)
    return [output, *torch.autograd.grad(output, leaves, upstream)]


def residual_norm_check(config: RunConfig) -> tuple[Results, Results]:
    """Check a sublayer's norm with as many readers as a mixer of either kind and the experts are."""
    width = config.model.hidden_size
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    for readers in (1, 2, 4):

        def run(fused: bool, x: Tensor, weight: Tensor, readers: int = readers) -> Tensor:
            return torch.stack(residual_norm.residual_norm(x, weight, 1e-6, readers, fused=fused))

        inputs = [random(_TOKENS + readers, width), 0.1 * random(width)]
        for fused, result in zip((True, False), results):
            result.extend(with_gradients(partial(run, fused), inputs))
    return results


def attention_inputs_check(config: RunConfig) -> tuple[Results, Results]:
    """Check what stands before attention, at this rank's heads, two rows."""
    model, share = config.model, config.parallel.tensor_model_parallel_size
    groups, dim = max(1, model.num_query_groups // share), model.kv_channels
    queries = max(1, model.num_attention_heads // share // groups)
    is_gated = model.gate_lies_with_queries
    each = ((1 + is_gated) * queries + 2) * dim
    half = random(_TOKENS, model.rotary_dim // 2, dtype=torch.float32)
    angles = 3 * torch.cat([half, half], 1)

    def run(fused: bool, x: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        made = qkv_norm_rope.attention_inputs(x, angles, q_norm, k_norm, groups, is_gated, 1e-6, fused=fused)
        return torch.cat([part.flatten() for part in made if part is not None])

    inputs = [random(_TOKENS, 2, groups * each), 0.1 * random(dim), 0.1 * random(dim + 1)[1:]]
    fused = with_gradients(partial(run, True), inputs)
    return fused, with_gradients(partial(run, False), inputs)
