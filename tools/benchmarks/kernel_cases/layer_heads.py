"""What stands at a layer's head, timed: the norm of the residual stream with its sums, and attention's inputs.

Beside ours are torch's compositions; the libraries' norms and rotations alone are in no row, since what is saved is
the passes between them.
"""

from functools import partial
from typing import Any

import torch

HIDDEN, GROUPS, QUERIES, DIM, TURNED = 2048, 2, 8, 256, 64


def layer_heads(bench: Any) -> None:
    """Measure both, forward and backward."""
    _norms(bench)
    _attention_inputs(bench)


def _norms(bench: Any) -> None:
    """GB/s of what is read and written once; readers as attention, Gated DeltaNet and the experts have them."""
    from megatron_q3n.kernels import residual_norm_triton as fused
    from megatron_q3n.kernels.residual_norm import residual_norm

    x, weight = bench.random(bench.tokens, HIDDEN), bench.random(HIDDEN)
    gradients, gb = [bench.random(bench.tokens, HIDDEN) for _ in range(5)], x.numel() * 2 / 1e9
    bench.time("heads", "norm: ours forward", lambda: fused.residual_norm(x, weight, 1e-6), 2 * gb)
    for readers in (1, 2, 4):
        given = partial(fused.residual_norm_backward, x, weight, 1e-6, gradients[0], gradients[1 : readers + 1])
        what = f"norm and {readers + 1} gradients: ours backward"
        bench.time("heads", what, given, (readers + 3) * gb)

    def composed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        stream, *normed = residual_norm(x, weight, 1e-6, 4, fused=False)
        return stream + normed[0] + normed[1] + normed[2] + normed[3]

    bench.forward_backward("heads", "norm and 5 gradients: torch", composed, [x, weight], 2 * gb)


def _attention_inputs(bench: Any) -> None:
    """Split, norm and rotation of 16 query and 2 key heads."""
    from megatron_q3n.kernels.attention.qkv_norm_rope import attention_inputs

    width = GROUPS * (2 * QUERIES + 2) * DIM
    x, norms = bench.random(bench.sequence, bench.batch, width), [bench.random(DIM) for _ in "qk"]
    half = bench.random(bench.sequence, TURNED // 2, dtype=torch.float32)
    angles, gb = torch.cat([half, half], 1), x.numel() * 2 / 1e9
    for fused, whose in ((True, "ours"), (False, "torch")):

        def run(x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, fused: bool = fused) -> Any:
            made = attention_inputs(x, angles, q, k, GROUPS, True, 1e-6, fused=fused)
            return torch.cat([part.flatten() for part in made if part is not None])

        what = f"attention inputs and a copy of them: {whose}"
        bench.forward_backward("heads", what, run, [x, *norms], 2 * gb)
