"""Everything of Gated DeltaNet between its projections: convolution, gates, delta rule, gated norm.

`delta_mixer` composes the torch references, and is what the fused form is tested against. Fused,
the whole is one autograd function around the delta rule: a few passes over the channels,
no transposed, sliced or concatenated copy of the projection's output, and one gradient buffer that
the norm (z) and the convolution (q, k, v) each fill their part of.

Shapes: T tokens, B rows, X = 2·Hk·K + 2·Hv·V projection channels (q|k|v|z), C = q|k|v channels, D documents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels import registry
from megatron_q3n.kernels.gated_delta.causal_conv import causal_conv, positions_in_documents
from megatron_q3n.kernels.norms import gated_rms_norm, l2_norm

OPERATION = "gated delta net around the rule"
Rule = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class DeltaWeights:
    """The mixer's vectors: taps [C,K], A_log and dt_bias [Hv] (fp32), the output norm's weight [V] (fp32)."""

    taps_CK: Tensor
    a_log_H: Tensor
    dt_bias_H: Tensor
    norm_V: Tensor


@dataclass(frozen=True)
class DeltaHeads:
    """Head counts and sizes at hand, and the norm's epsilon."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    eps: float

    @property
    def sections(self) -> list[int]:
        """Widths of q, k, v, z."""
        key, value = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        return [key, key, value, value]


def delta_mixer(
    qkvz_TBX: Tensor,
    beta_alpha_TBX: Tensor,
    weights: DeltaWeights,
    heads: DeltaHeads,
    rule: Rule,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Mix rows (or packed documents) from zero states.

    Returns: [T,B,Hv·V], normed and gated, contiguous.
    """
    fits = heads.key_dim == heads.value_dim and heads.key_dim & (heads.key_dim - 1) == 0
    mixer = composed_delta_mixer
    if registry.is_fused(OPERATION, qkvz_TBX) and fits:
        mixer = fused_delta_mixer
    return mixer(qkvz_TBX, beta_alpha_TBX, weights, heads, rule, cu_seqlens)


def fused_delta_mixer(
    qkvz_TBX: Tensor,
    beta_alpha_TBX: Tensor,
    weights: DeltaWeights,
    heads: DeltaHeads,
    rule: Rule,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Do it with the fused passes; key and value heads of one size, a power of two."""
    position = None
    if cu_seqlens is not None:
        position = positions_in_documents(cu_seqlens, qkvz_TBX.shape[0]).to(torch.int32)
    return _Fused.apply(
        qkvz_TBX,
        beta_alpha_TBX,
        weights.taps_CK,
        weights.a_log_H,
        weights.dt_bias_H,
        weights.norm_V,
        heads,
        rule,
        cu_seqlens,
        position,
        torch.is_grad_enabled(),
    )


def composed_delta_mixer(
    qkvz_TBX: Tensor,
    beta_alpha_TBX: Tensor,
    weights: DeltaWeights,
    heads: DeltaHeads,
    rule: Rule,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Do the same from torch operations."""
    qkvz, beta_alpha = qkvz_TBX.transpose(0, 1), beta_alpha_TBX.transpose(0, 1)
    _, z, inputs = delta_rule_inputs(qkvz, beta_alpha, weights, heads, None, cu_seqlens)
    output, _ = rule(*inputs, cu_seqlens=cu_seqlens, output_final_state=False)
    gated = gated_rms_norm(output, z, weights.norm_V, heads.eps)
    return gated.flatten(2).transpose(0, 1).contiguous()


def delta_rule_inputs(
    qkvz_BTX: Tensor,
    beta_alpha_BTX: Tensor,
    weights: DeltaWeights,
    heads: DeltaHeads,
    conv_state_DCK: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Split, convolve, normalise.

    Returns: raw q|k|v, the gate z [B,T,Hv,V], and the rule's query, key, value, decay, beta.
    """
    sections = heads.sections
    qkv, z = qkvz_BTX.split([sum(sections[:3]), sections[3]], -1)
    mixed = causal_conv(qkv, weights.taps_CK, cu_seqlens=cu_seqlens, initial_state_DCK=conv_state_DCK)
    query, key, value = mixed.split(sections[:3], -1)
    query, key = (l2_norm(x.unflatten(-1, (-1, heads.key_dim))) for x in (query, key))
    value, z = (x.unflatten(-1, (-1, heads.value_dim)) for x in (value, z))
    beta, alpha = (x.float() for x in beta_alpha_BTX.chunk(2, -1))
    decay = -weights.a_log_H.exp() * F.softplus(alpha + weights.dt_bias_H)
    return qkv, z, [query, key, value, decay, beta.sigmoid()]


class _Fused(torch.autograd.Function):
    """The fused form. The rule's own graph is kept in `ctx` and run backward in the middle of ours."""

    @staticmethod
    def forward(
        ctx: Any,
        qkvz: Tensor,
        beta_alpha: Tensor,
        taps: Tensor,
        a_log: Tensor,
        dt_bias: Tensor,
        norm: Tensor,
        heads: DeltaHeads,
        rule: Rule,
        cu_seqlens: Tensor | None,
        position: Tensor | None,
        trains: bool,  # ctx.needs_input_grad is true of parameters even where no gradients are kept
    ) -> Tensor:
        from megatron_q3n.kernels.gated_delta import gated_norm_triton, mixer_inputs_triton  # late: Triton

        shape = mixer_inputs_triton.DeltaShape(heads.key_heads, heads.value_heads, heads.key_dim)
        leaves = [
            *mixer_inputs_triton.delta_inputs(qkvz, taps, position, shape),
            *mixer_inputs_triton.delta_gates(beta_alpha, a_log, dt_bias, qkvz.dtype),
        ]
        with torch.set_grad_enabled(trains):
            if trains:
                leaves = [x.requires_grad_() for x in leaves]
            output, _ = rule(*leaves, cu_seqlens=cu_seqlens, output_final_state=False)
        ctx.save_for_backward(qkvz, beta_alpha, taps, a_log, dt_bias, norm, position)
        ctx.heads, ctx.shape, ctx.leaves, ctx.output = heads, shape, leaves, output
        return gated_norm_triton.gated_norm(output.detach(), qkvz, norm, heads.eps)

    @staticmethod
    def backward(ctx: Any, dmixed: Tensor) -> tuple[Any, ...]:
        from megatron_q3n.kernels.gated_delta import gated_norm_triton, mixer_inputs_triton  # late: Triton

        qkvz, beta_alpha, taps, a_log, dt_bias, norm, position = ctx.saved_tensors
        dqkvz = torch.empty_like(qkvz, memory_format=torch.contiguous_format)
        qkvz = qkvz.contiguous()
        doutput, dnorm = gated_norm_triton.gated_norm_backward(
            ctx.output.detach(), qkvz, norm, ctx.heads.eps, dmixed, dqkvz
        )
        dq, dk, dv, ddecay, dbeta = torch.autograd.grad(ctx.output, ctx.leaves, doutput)
        ctx.leaves = ctx.output = None
        dtaps = mixer_inputs_triton.delta_inputs_backward(qkvz, taps, position, ctx.shape, dq, dk, dv, dqkvz)
        dba, da_log, ddt_bias = mixer_inputs_triton.delta_gates_backward(beta_alpha, a_log, dt_bias, ddecay, dbeta)
        gradients = dqkvz, dba, dtaps.to(taps.dtype), da_log, ddt_bias, dnorm
        return (*gradients, None, None, None, None, None)
