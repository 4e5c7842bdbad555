"""Gated DeltaNet mixer between its projections: causal convolution, gates, delta rule, gated RMSNorm.

`delta_mixer_reference` composes the torch references; the fused form is tested against it. Fused, the whole is one
autograd function around the delta rule: a few passes over the channels, no transposed, sliced or concatenated copy of
the projection's output, and one gradient buffer, of which the norm (z) and the convolution (q, k, v) each fill a part.

Reference: Gated Delta Networks (arXiv 2412.06464), section 3.
Shapes: T tokens, B rows, X = 2·Hk·K + 2·Hv·V projection channels (q|k|v|z), C = q|k|v channels, D documents.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels.gated_delta.causal_conv import causal_conv
from megatron_q3n.kernels.gated_delta.operands import DeltaHeads, DeltaShape, DeltaWeights
from megatron_q3n.kernels.norms import gated_rms_norm, l2_norm
from megatron_q3n.packing import Packing

Rule = Callable[..., tuple[Tensor, Tensor | None]]


def delta_mixer(
    qkvz_TBX: Tensor,
    beta_alpha_TBX: Tensor,
    weights: DeltaWeights,
    heads: DeltaHeads,
    rule: Rule,
    packing: Packing | None = None,
    fused: bool = False,
) -> Tensor:
    """Mix rows (or packed documents) from zero states; `fused` runs the Triton kernels instead of the reference.

    Returns: [T,B,Hv·V], normed and gated, contiguous.
    """
    mixer = fused_delta_mixer if fused else delta_mixer_reference
    return mixer(qkvz_TBX, beta_alpha_TBX, weights, heads, rule, packing)


def fused_delta_mixer(
    qkvz_TBX: Tensor,
    beta_alpha_TBX: Tensor,
    weights: DeltaWeights,
    heads: DeltaHeads,
    rule: Rule,
    packing: Packing | None = None,
) -> Tensor:
    """Run the mixer with the fused passes; key and value head dims are equal and a power of two."""
    position = None if packing is None else packing.position_T
    return _FusedDeltaMixer.apply(
        qkvz_TBX,
        beta_alpha_TBX,
        weights.conv_weight_CK,
        weights.a_log_H,
        weights.dt_bias_H,
        weights.norm_V,
        heads,
        rule,
        packing,
        position,
        torch.is_grad_enabled(),
    )


def delta_mixer_reference(
    qkvz_TBX: Tensor,
    beta_alpha_TBX: Tensor,
    weights: DeltaWeights,
    heads: DeltaHeads,
    rule: Rule,
    packing: Packing | None = None,
) -> Tensor:
    """Run the mixer from torch operations."""
    qkvz, beta_alpha = qkvz_TBX.transpose(0, 1), beta_alpha_TBX.transpose(0, 1)
    _, z, inputs = delta_rule_inputs(qkvz, beta_alpha, weights, heads, None, packing)
    output, _ = rule(*inputs, packing=packing, output_final_state=False)
    gated = gated_rms_norm(output, z, weights.norm_V, heads.eps)
    return gated.flatten(2).transpose(0, 1).contiguous()


def delta_rule_inputs(
    qkvz_BTX: Tensor,
    beta_alpha_BTX: Tensor,
    weights: DeltaWeights,
    heads: DeltaHeads,
    conv_state_DCK: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Split the projection, convolve, normalize q and k, and compute the gates.

    Returns: q|k|v before the convolution, the gate z [B,T,Hv,V], and the rule's query, key, value, decay, beta.
    """
    sections = heads.sections
    qkv, z = qkvz_BTX.split([sum(sections[:3]), sections[3]], -1)
    mixed = causal_conv(qkv, weights.conv_weight_CK, packing=packing, initial_state_DCK=conv_state_DCK)
    query, key, value = mixed.split(sections[:3], -1)
    query, key = (l2_norm(x.unflatten(-1, (-1, heads.key_dim))) for x in (query, key))
    value, z = (x.unflatten(-1, (-1, heads.value_dim)) for x in (value, z))
    beta, alpha = (x.float() for x in beta_alpha_BTX.chunk(2, -1))
    decay = -weights.a_log_H.exp() * F.softplus(alpha + weights.dt_bias_H)
    return qkv, z, [query, key, value, decay, beta.sigmoid()]


class _FusedDeltaMixer(torch.autograd.Function):
    """Fused mixer; the autograd graph of the rule is kept in `ctx` and run inside this backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        qkvz: Tensor,
        beta_alpha: Tensor,
        conv_weight: Tensor,
        a_log: Tensor,
        dt_bias: Tensor,
        norm: Tensor,
        heads: DeltaHeads,
        rule: Rule,
        packing: Packing | None,
        position: Tensor | None,
        # ctx.needs_input_grad is true for parameters even under no_grad
        with_gradients: bool,
    ) -> Tensor:
        from megatron_q3n.kernels.gated_delta import (  # late: Triton
            gated_norm_triton,
            gates_triton,
            mixer_inputs_triton,
        )

        shape = DeltaShape(heads.key_heads, heads.value_heads, heads.key_dim)
        leaves = [
            *mixer_inputs_triton.delta_inputs(qkvz, conv_weight, position, shape),
            *gates_triton.delta_gates(beta_alpha, a_log, dt_bias, qkvz.dtype),
        ]
        with torch.set_grad_enabled(with_gradients):
            if with_gradients:
                leaves = [x.requires_grad_() for x in leaves]
            output, _ = rule(*leaves, packing=packing, output_final_state=False)
        ctx.save_for_backward(qkvz, beta_alpha, conv_weight, a_log, dt_bias, norm, position)
        ctx.heads, ctx.shape, ctx.leaves, ctx.output = heads, shape, leaves, output
        return gated_norm_triton.gated_norm(output.detach(), qkvz, norm, heads.eps)

    @staticmethod
    def backward(ctx: Any, dmixed: Tensor) -> tuple[Any, ...]:
        from megatron_q3n.kernels.gated_delta import (  # late: Triton
            gated_norm_triton,
            gates_triton,
            mixer_inputs_triton,
        )

        qkvz, beta_alpha, conv_weight, a_log, dt_bias, norm, position = ctx.saved_tensors
        dqkvz = torch.empty_like(qkvz, memory_format=torch.contiguous_format)
        qkvz = qkvz.contiguous()
        doutput, dnorm = gated_norm_triton.gated_norm_backward(
            ctx.output.detach(), qkvz, norm, ctx.heads.eps, dmixed, dqkvz
        )
        dq, dk, dv, ddecay, dbeta = torch.autograd.grad(ctx.output, ctx.leaves, doutput)
        ctx.leaves = ctx.output = None
        dconv_weight = mixer_inputs_triton.delta_inputs_backward(
            qkvz, conv_weight, position, ctx.shape, dq, dk, dv, dqkvz
        )
        dba, da_log, ddt_bias = gates_triton.delta_gates_backward(beta_alpha, a_log, dt_bias, ddecay, dbeta)
        gradients = dqkvz, dba, dconv_weight.to(conv_weight.dtype), da_log, ddt_bias, dnorm
        return (*gradients, None, None, None, None, None)
