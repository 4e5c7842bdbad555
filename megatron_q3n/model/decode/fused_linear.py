"""Projections of a decode pass, fused with the norm before them (prologue) and the residual after them (epilogue).

kernels/decode/gemm.py describes the decode GEMM. Where it does not apply (more rows, gradients, several ranks,
quantized weights, no GPU) the modules run one after the other, as in megatron-core. Each function serves one place of
the model, with its own modules and weights. No layer of this architecture has a bias.

Shapes: T new tokens of N sequences as `Span` arranges them, X hidden size, S tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_q3n.config.execution_plan import DecodePlan
from megatron_q3n.kernels.decode import gemm as kernels
from megatron_q3n.kernels.decode.experts import add_product
from megatron_q3n.kernels.decode.operands import GemmInput, RMSNormWeights
from megatron_q3n.model.decode.protocols import DecodeModel, MTPLayer
from megatron_q3n.model.protocols import Linear, Norm


def project(linear: Linear, x: Tensor, plan: DecodePlan) -> Tensor:
    """Multiply with a linear's weight; on one rank without the module's wrapper, which is slower than the product."""
    return F.linear(x, linear.weight) if plan.whole_linear else linear(x)[0]


def norm_and_project(
    norm: Norm | None, linears: Sequence[Linear], x: Tensor, config: TransformerConfig
) -> list[Tensor]:
    """Normalize the input, and multiply it with the weights of one or two linears.

    Shapes: x [T,N,X]; `norm` is None if it is normalized already.
    Returns: [T,N,·] of each linear.
    """
    weights = [linear.weight for linear in linears]
    if norm is not None and uses_decode_gemm(config.plan.decode, x, *weights):
        rows = GemmInput(_flatten_rows(x), norm_weights(norm, config))
        second = weights[1] if len(weights) > 1 else None
        output = kernels.decode_gemm(rows, weights[0], second_weight_MK=second, fused=True)
        parts = [output.out_RN] if output.second_out_RM is None else [output.out_RN, output.second_out_RM]
        return [part.view(*x.shape[:-1], -1) for part in parts]
    normed = x if norm is None else norm(x)
    return [project(linear, normed, config.plan.decode) for linear in linears]


def project_and_add(linear: Linear, x: Tensor, residual: Tensor, config: TransformerConfig) -> Tensor:
    """Add a linear's product to the residual; on one rank in one kernel launch.

    Shapes: x [T,N,·], residual [T,N,X].
    Returns: the sum [T,N,X], possibly in the residual's memory.
    """
    plan: DecodePlan = config.plan.decode
    if not plan.whole_linear or residual.dtype != x.dtype:
        return residual + project(linear, x, plan)
    if not uses_decode_gemm(plan, x, linear.weight):
        return add_product(residual, x, linear.weight)
    rows, residual_RN = GemmInput(_flatten_rows(x)), _flatten_rows(residual)
    output = kernels.decode_gemm(rows, linear.weight, residual_RN=residual_RN, fused=True)
    return output.out_RN.view(residual.shape)


def project_mtp_inputs(mtp: MTPLayer, hidden: Tensor, embedded: Tensor) -> Tensor:
    """Normalize hidden states and next-token embeddings, and project their concatenation to the MTP layer's input.

    Shapes: [T,N,X] each, and the result.
    """
    config, weight = mtp.config, mtp.eh_proj.weight
    if hidden.dtype != embedded.dtype or not uses_decode_gemm(config.plan.decode, hidden, weight):
        return mtp._concat_embeddings(hidden, embedded)
    first = GemmInput(_flatten_rows(embedded), norm_weights(mtp.enorm, config))
    second = GemmInput(_flatten_rows(hidden), norm_weights(mtp.hnorm, config))
    return kernels.decode_gemm(first, weight, second=second, fused=True).out_RN.view(hidden.shape)


def norm_and_logits(model: DecodeModel, norm: Norm, hidden_SX: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the final norm and the output layer.

    Returns: the normalized hidden states [S,X], and logits over the whole vocabulary [S,V] in the model's dtype.
    """
    layer = model.output_layer
    if uses_decode_gemm(model.config.plan.decode, hidden_SX, layer.weight):
        rows = GemmInput(_flatten_rows(hidden_SX), norm_weights(norm, model.config))
        output = kernels.decode_gemm(rows, layer.weight, returns_normed=True, fused=True)
        assert output.normed_RX is not None
        return output.normed_RX, output.out_RN
    normed = norm(hidden_SX)
    return normed, compute_raw_logits(model, normed)


def compute_raw_logits(model: DecodeModel, hidden_SX: Tensor) -> Tensor:
    """Return logits over the whole vocabulary [S,V] in the model's dtype, gathered from tensor-parallel ranks."""
    logits, _ = model.output_layer(hidden_SX.unsqueeze(1), runtime_gather_output=True)
    return logits.squeeze(1)


def uses_decode_gemm(plan: DecodePlan, x: Tensor, *weights: Tensor) -> bool:
    """Return whether the decode GEMM runs an input [...,X]: in the plan, no gradients, few rows for each weight."""
    if not plan.gemm or torch.is_grad_enabled():
        return False
    num_rows = x.numel() // x.shape[-1]
    return all(num_rows <= kernels.max_rows(weight) for weight in weights)


def norm_weights(norm: Norm, config: TransformerConfig) -> RMSNormWeights:
    """Return the parameters of a norm of this model, on either backend."""
    offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
    return RMSNormWeights(norm.weight, config.layernorm_epsilon, offset)


def _flatten_rows(x: Tensor) -> Tensor:
    """Return rows [R,X], each contiguous."""
    return x.reshape(-1, x.shape[-1])
