"""Kernels before a mixer: residual RMSNorm with gradient accumulation, and QKV split, QK-norm and RoPE.

They are compared with torch compositions; a library's norm or rotation alone is not measured, since the fusion saves
the passes between them.
"""

from functools import partial
from typing import Any

import torch

HIDDEN, NUM_GROUPS, QUERIES_PER_GROUP, DIM, ROTARY_DIM = 2048, 2, 8, 256, 64


def bench_layer_prologues(bench: Any) -> None:
    """Measure both, forward and backward."""
    _bench_residual_norm(bench)
    _bench_qkv_norm_rope(bench)


def _bench_residual_norm(bench: Any) -> None:
    """Time the norm with the numbers of consumers of attention, Gated DeltaNet and the MoE layer."""
    from megatron_q3n.kernels import residual_norm_triton as fused
    from megatron_q3n.kernels.residual_norm import residual_norm

    x, weight = bench.random(bench.tokens, HIDDEN), bench.random(HIDDEN)
    gradients, gb = [bench.random(bench.tokens, HIDDEN) for _ in range(5)], x.numel() * 2 / 1e9
    bench.time("prologues", "norm: ours forward", lambda: fused.residual_norm(x, weight, 1e-6), 2 * gb)
    for num_consumers in (1, 2, 4):
        backward = partial(
            fused.residual_norm_backward, x, weight, 1e-6, gradients[0], gradients[1 : num_consumers + 1]
        )
        case_name = f"norm and {num_consumers + 1} gradients: ours backward"
        bench.time("prologues", case_name, backward, (num_consumers + 3) * gb)

    def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        residual, *normed = residual_norm(x, weight, 1e-6, 4, fused=False)
        return residual + normed[0] + normed[1] + normed[2] + normed[3]

    bench.forward_backward("prologues", "norm and 5 gradients: torch", reference, [x, weight], 2 * gb)


def _bench_qkv_norm_rope(bench: Any) -> None:
    """Time split, norm and RoPE of 16 query and 2 key heads."""
    from megatron_q3n.kernels.attention.qkv_norm_rope import qkv_norm_rope

    width = NUM_GROUPS * (2 * QUERIES_PER_GROUP + 2) * DIM
    x, norms = bench.random(bench.sequence, bench.batch, width), [bench.random(DIM) for _ in "qk"]
    half = bench.random(bench.sequence, ROTARY_DIM // 2, dtype=torch.float32)
    angles, gb = torch.cat([half, half], 1), x.numel() * 2 / 1e9
    for fused, name in ((True, "ours"), (False, "torch")):

        def run(x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, fused: bool = fused) -> Any:
            outputs = qkv_norm_rope(x, angles, q, k, NUM_GROUPS, True, 1e-6, fused=fused)
            return torch.cat([part.flatten() for part in outputs if part is not None])

        case_name = f"qkv_norm_rope and a copy of its outputs: {name}"
        bench.forward_backward("prologues", case_name, run, [x, *norms], 2 * gb)
