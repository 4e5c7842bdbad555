"""A few rows through the model's projections, with the norms before them and the residual after: a launch each.

`kernels/decode/gemm.py` says what is gained. Where it does not serve (more rows, gradients, several ranks, quantised
weights, no GPU) the modules run one after the other, as megatron-core has them. Each function is one place
of the model, with its own modules and weights. No layer of this architecture has a bias.

Shapes: T new tokens of N sequences as `Span` arranges them, X hidden size, S tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_q3n.kernels.decode import gemm as kernels
from megatron_q3n.kernels.decode.experts import add_product
from megatron_q3n.kernels.decode.gemm import RowNorm, Rows


def project(linear: nn.Module, x: Tensor, tp_group: Any) -> Tensor:
    """Multiply with a linear's weight; on one rank without its wrapper, which is slower than the product."""
    return F.linear(x, linear.weight) if tp_group.size() == 1 else linear(x)[0]


def project_normed(
    norm: nn.Module | None, linears: Sequence[Any], x: Tensor, config: Any, tp_group: Any
) -> list[Tensor]:
    """Norm what came, and multiply it with one or two linears' weights.

    Shapes: x [T,N,X]; `norm` is None where it was normed before. Returns: [T,N,·] of each linear.
    """
    weights = [linear.weight for linear in linears]
    if norm is not None and is_few(x, config, tp_group, *weights):
        given = Rows(_flat(x), row_norm(norm, config))
        beside = weights[1] if len(weights) > 1 else None
        made = kernels.few_rows(given, weights[0], beside_MK=beside, fused=True)
        parts = [made.out_RN] if made.beside_RM is None else [made.out_RN, made.beside_RM]
        return [part.view(*x.shape[:-1], -1) for part in parts]
    normed = x if norm is None else norm(x)
    return [project(linear, normed, tp_group) for linear in linears]


def add_projected(linear: Any, x: Tensor, residual: Tensor, config: Any, tp_group: Any) -> Tensor:
    """Add a linear's product to the residual; on one rank in the product's own launch, maybe where the residual lies.

    Shapes: x [T,N,·], residual [T,N,X]; returns the same.
    """
    if tp_group.size() > 1 or residual.dtype != x.dtype:
        return residual + project(linear, x, tp_group)
    if not is_few(x, config, tp_group, linear.weight):
        return add_product(residual, x, linear.weight)
    flat = _flat(residual)
    made = kernels.few_rows(Rows(_flat(x)), linear.weight, sum_RN=flat, fused=True)
    return made.out_RN.view(residual.shape)


def join_embeddings(mtp: Any, hidden: Tensor, embedded: Tensor) -> Tensor:
    """Norm the trunk's hidden states and the next tokens' embeddings, and project both into the draft layer.

    Shapes: [T,N,X] each; returns the same.
    """
    config, weight = mtp.config, mtp.eh_proj.weight
    if hidden.dtype != embedded.dtype or not is_few(hidden, config, mtp.tp_group, weight):
        return mtp._concat_embeddings(hidden, embedded)
    first = Rows(_flat(embedded), row_norm(mtp.enorm, config))
    then = Rows(_flat(hidden), row_norm(mtp.hnorm, config))
    return kernels.few_rows(first, weight, then=then, fused=True).out_RN.view(hidden.shape)


def read_out(model: Any, norm: nn.Module, hidden_SX: Tensor) -> tuple[Tensor, Tensor]:
    """Norm the last layer's output, and multiply it with the output layer's weight.

    Returns: the normed hidden states [S,X], and logits [S,V] of the whole vocabulary in their format.
    """
    layer, group = model.output_layer, model.pg_collection.tp
    if is_few(hidden_SX, model.config, group, layer.weight):
        given = Rows(_flat(hidden_SX), row_norm(norm, model.config))
        made = kernels.few_rows(given, layer.weight, keeps=True, fused=True)
        assert made.normed_RX is not None
        return made.normed_RX, made.out_RN
    normed = norm(hidden_SX)
    return normed, raw_logits_of(model, normed)


def raw_logits_of(model: Any, hidden_SX: Tensor) -> Tensor:
    """Return logits over the whole vocabulary [S,V], gathered from tensor-parallel ranks, in their format."""
    logits, _ = model.output_layer(hidden_SX.unsqueeze(1), runtime_gather_output=True)
    return logits.squeeze(1)


def is_few(x: Tensor, config: Any, tp_group: Any, *weights: Tensor | None) -> bool:
    """Whether the fused kernel serves these rows and weights."""
    is_alone = tp_group.size() == 1 and config.normalization == "RMSNorm"
    return is_alone and kernels.serves(x, *weights)


def row_norm(norm: nn.Module, config: Any) -> RowNorm:
    """Say what a norm of this model does, on either backend."""
    assert isinstance(norm.weight, Tensor)
    offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
    return RowNorm(norm.weight, config.layernorm_epsilon, offset)


def _flat(x: Tensor) -> Tensor:
    """Return rows [R,X], each contiguous."""
    return x.reshape(-1, x.shape[-1])
