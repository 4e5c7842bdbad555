"""From the projection of gated attention to its queries, gates, keys and values, normed and turned to their positions.

The reference is megatron-core's way, in fp32 within: split, RMSNorm of each query and key head, rotary position
embedding (arXiv 2104.09864) of a head's first channels, of which each turns with the one half of them away.

Shapes: T tokens, B rows, X = G·(2·R+2)·D channels, G groups of R query heads, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_q3n.kernels import registry
from megatron_q3n.kernels.norms import rms_norm

OPERATION = "attention's inputs"


def serves(qkv_TBX: Tensor, head_dim: int) -> bool:
    """Whether the fused kernel runs here."""
    return registry.is_fused(OPERATION, qkv_TBX) and head_dim & (head_dim - 1) == 0


def attention_inputs(
    qkv_TBX: Tensor,
    angles_TR: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    groups: int,
    is_gated: bool,
    eps: float,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Split, normalise and turn.

    Shapes: angles [T, turned channels] fp32, the second half as the first. `fused` forces the choice that `choices`
        makes otherwise.
    Returns: query [T,B,G·R,D], key and value [T,B,G,D], and the gate [T,B,G,R·D] where there is one.
    """
    if registry.is_fused(OPERATION, qkv_TBX, fused):
        cos, sin = angles_TR.cos(), angles_TR.sin()
        query, key, value, *gate = _Fused.apply(qkv_TBX, cos, sin, q_weight_D, k_weight_D, groups, is_gated, eps)
        return query, key, value, gate[0] if gate else None
    dim = q_weight_D.numel()
    parts = qkv_TBX.unflatten(-1, (groups, -1)).split(_shape(qkv_TBX, groups, dim, is_gated).parts, -1)
    query, gate, key, value = parts
    query = query.unflatten(-1, (-1, dim)).flatten(2, 3)
    query, key = (turn(rms_norm(x, weight, eps), angles_TR) for x, weight in ((query, q_weight_D), (key, k_weight_D)))
    return query, key, value, gate if is_gated else None


def turn(x_TBHD: Tensor, angles_TR: Tensor) -> Tensor:
    """Turn each head's first channels by its token's angles."""
    angles = angles_TR[:, None, None].to(torch.promote_types(x_TBHD.dtype, torch.float32))
    turned, rest = x_TBHD.split([angles.shape[-1], x_TBHD.shape[-1] - angles.shape[-1]], -1)
    first, second = turned.chunk(2, -1)
    across = torch.cat([-second, first], -1)
    turned = turned * angles.cos() + across * angles.sin()
    return torch.cat([turned.to(x_TBHD.dtype), rest], -1)


def _shape(qkv_TBX: Tensor, groups: int, dim: int, is_gated: bool) -> Any:
    from megatron_q3n.kernels.attention.qkv_norm_rope_triton import AttentionShape  # late: Triton

    heads = qkv_TBX.shape[-1] // groups // dim - 2
    return AttentionShape(groups, heads // 2 if is_gated else heads, dim, is_gated)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        groups: int,
        is_gated: bool,
        eps: float,
    ) -> Any:
        from megatron_q3n.kernels.attention import qkv_norm_rope_triton as fused  # late: Triton

        qkv = qkv.contiguous()
        shape = _shape(qkv, groups, q_weight.numel(), is_gated)
        ctx.save_for_backward(qkv, cos, sin, q_weight, k_weight)
        ctx.shape, ctx.eps = shape, eps
        made = fused.attention_inputs(qkv, cos, sin, q_weight, k_weight, shape, eps)
        if not is_gated:
            return made
        return *made, qkv.detach().unflatten(-1, (groups, -1)).split(shape.parts, -1)[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        from megatron_q3n.kernels.attention import qkv_norm_rope_triton as fused  # late: Triton

        dquery, dkey, dvalue, *dgate = (gradient.contiguous() for gradient in gradients)
        qkv, cos, sin, q_weight, k_weight = ctx.saved_tensors
        dqkv, dq_weight, dk_weight = fused.attention_inputs_backward(
            qkv, cos, sin, q_weight, k_weight, ctx.shape, ctx.eps, dquery, dgate[0] if dgate else None, dkey, dvalue
        )
        weights = dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype)
        return dqkv, None, None, *weights, None, None, None
