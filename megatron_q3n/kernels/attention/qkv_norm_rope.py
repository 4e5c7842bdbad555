"""QKV split, query/key RMSNorm and RoPE: from the projection of gated attention to its core's inputs.

The reference follows megatron-core, in fp32 inside: split, RMSNorm of each query and key head, partial rotary position
embedding (kernels/attention/rope.py). Fused, it is one pass over the projection in each direction.

Shapes: T tokens, B rows, X = G·(2·R+2)·D channels ((R+2)·D per group without a gate), G groups of R query heads,
D head dim, W rotated channels.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_q3n.kernels.attention.rope import apply_rope
from megatron_q3n.kernels.norms import accumulation_dtype, rms_norm


def qkv_norm_rope(
    qkv_TBX: Tensor,
    angles_TW: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    num_groups: int,
    is_gated: bool,
    eps: float,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Split the projection, normalize queries and keys, and apply RoPE to them.

    Shapes: angles [T,W] fp32, whose second half equals the first.
        `fused` runs the Triton kernel instead of the reference.
    Returns: query [T,B,G·R,D], key and value [T,B,G,D], and the gate [T,B,G,R·D] where there is one.
    """
    if fused:
        cos, sin = angles_TW.cos(), angles_TW.sin()
        query, key, value, *gate = _FusedQKVNormRope.apply(
            qkv_TBX, cos, sin, q_weight_D, k_weight_D, num_groups, is_gated, eps
        )
        return query, key, value, gate[0] if gate else None
    head_dim = q_weight_D.numel()
    sections = _shape(qkv_TBX, num_groups, head_dim, is_gated).sections
    query, gate, key, value = qkv_TBX.unflatten(-1, (num_groups, -1)).split(sections, -1)
    query = query.unflatten(-1, (-1, head_dim)).flatten(2, 3)
    angles = angles_TW[:, None, None].to(accumulation_dtype(query))
    cos, sin = angles.cos(), angles.sin()
    query, key = (
        apply_rope(rms_norm(x, weight, eps), cos, sin) for x, weight in ((query, q_weight_D), (key, k_weight_D))
    )
    return query, key, value, gate if is_gated else None


def _shape(qkv_TBX: Tensor, num_groups: int, head_dim: int, is_gated: bool) -> Any:
    from megatron_q3n.kernels.attention.qkv_norm_rope_triton import AttentionShape  # late: Triton

    heads = qkv_TBX.shape[-1] // num_groups // head_dim - 2
    return AttentionShape(num_groups, heads // 2 if is_gated else heads, head_dim, is_gated)


class _FusedQKVNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        num_groups: int,
        is_gated: bool,
        eps: float,
    ) -> Any:
        from megatron_q3n.kernels.attention import qkv_norm_rope_triton as kernel  # late: Triton

        qkv = qkv.contiguous()
        shape = _shape(qkv, num_groups, q_weight.numel(), is_gated)
        ctx.save_for_backward(qkv, cos, sin, q_weight, k_weight)
        ctx.shape, ctx.eps = shape, eps
        outputs = kernel.qkv_norm_rope(qkv, cos, sin, q_weight, k_weight, shape, eps)
        if not is_gated:
            return outputs
        return *outputs, qkv.detach().unflatten(-1, (num_groups, -1)).split(shape.sections, -1)[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        from megatron_q3n.kernels.attention import qkv_norm_rope_triton as kernel  # late: Triton

        dquery, dkey, dvalue, *dgate = (gradient.contiguous() for gradient in gradients)
        qkv, cos, sin, q_weight, k_weight = ctx.saved_tensors
        dqkv, dq_weight, dk_weight = kernel.qkv_norm_rope_backward(
            qkv, cos, sin, q_weight, k_weight, ctx.shape, ctx.eps, dquery, dgate[0] if dgate else None, dkey, dvalue
        )
        weights = dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype)
        return dqkv, None, None, *weights, None, None, None
