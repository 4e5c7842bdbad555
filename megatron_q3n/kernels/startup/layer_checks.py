"""Start-up checks of the residual RMSNorm and of QKV split, QK-norm and RoPE.

Each check returns the results of the fused kernel and of the reference; `qualification.py` compares them.
"""

from functools import partial

import torch
from torch import Tensor

from megatron_q3n.config import RunConfig
from megatron_q3n.kernels import residual_norm
from megatron_q3n.kernels.attention import qkv_norm_rope
from megatron_q3n.kernels.startup.check_inputs import NUM_TOKENS, Results, random, with_gradients


def check_residual_norm(config: RunConfig) -> tuple[Results, Results]:
    """Run the norm with the numbers of consumers of both kinds of mixer and of the MoE layer."""
    width = config.model.hidden_size
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    for num_consumers in (1, 2, 4):

        def run(fused: bool, x: Tensor, weight: Tensor, num_consumers: int = num_consumers) -> Tensor:
            return torch.stack(residual_norm.residual_norm(x, weight, 1e-6, num_consumers, fused=fused))

        inputs = [random(NUM_TOKENS + num_consumers, width), 0.1 * random(width)]
        for fused, result in zip((True, False), results):
            result.extend(with_gradients(partial(run, fused), inputs))
    return results


def check_qkv_norm_rope(config: RunConfig) -> tuple[Results, Results]:
    """Run the split, QK-norm and RoPE with this rank's heads and two batch rows."""
    model, tp_size = config.model, config.parallel.tensor_model_parallel_size
    num_groups, head_dim = max(1, model.num_query_groups // tp_size), model.kv_channels
    queries_per_group = max(1, model.num_attention_heads // tp_size // num_groups)
    is_gated = model.gate_is_in_query_projection
    group_width = ((1 + is_gated) * queries_per_group + 2) * head_dim
    half = random(NUM_TOKENS, model.rotary_dim // 2, dtype=torch.float32)
    angles = 3 * torch.cat([half, half], 1)

    def run(fused: bool, x: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        outputs = qkv_norm_rope.qkv_norm_rope(x, angles, q_norm, k_norm, num_groups, is_gated, 1e-6, fused=fused)
        return torch.cat([part.flatten() for part in outputs if part is not None])

    inputs = [random(NUM_TOKENS, 2, num_groups * group_width), 0.1 * random(head_dim), 0.1 * random(head_dim + 1)[1:]]
    fused = with_gradients(partial(run, True), inputs)
    return fused, with_gradients(partial(run, False), inputs)
