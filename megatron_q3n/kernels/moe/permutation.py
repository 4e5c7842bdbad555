"""MoE token permutation for one process that holds all experts: tokens to permuted rows and back.

Permuted rows are sorted by expert, then by token. Fused, there is no sort and no host synchronization: row indices are
computed by counting, a token is read once for its K copies, and its K results are added in fp32.

Shapes: T tokens, E experts, K experts per token, R = T·K permuted rows, H width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_q3n.kernels.norms import accumulation_dtype


@dataclass(frozen=True)
class Routes:
    """Permutation of tokens to expert rows, on the device.

    Shapes: row [T,K] and expert [T,K] of each slot, token of each row [R], rows per expert [E].
    """

    row_TK: Tensor
    expert_TK: Tensor
    token_R: Tensor
    rows_per_expert_E: Tensor


def plan_routes(map_TE: Tensor, probs_TE: Tensor, topk: int, fused: bool = False) -> tuple[Routes, Tensor]:
    """Compute the row indices of a routing map in which every token has exactly `topk` experts.

    `fused` runs the Triton kernel instead of the reference.
    Returns: the routes, and the router gate of each row [R], differentiable in `probs`.
    """
    if fused:
        row, expert, token, counts, gates = _Plan.apply(map_TE, probs_TE, topk)
        return Routes(row, expert, token, counts), gates
    expert_R, token_R = map_TE.T.nonzero(as_tuple=True)
    row_TK = token_R.argsort(stable=True).view(-1, topk)
    return Routes(row_TK, expert_R[row_TK], token_R, map_TE.sum(0)), probs_TE[token_R, expert_R]


def scatter_rows(x_TH: Tensor, routes: Routes, fused: bool = False) -> Tensor:
    """Copy each token to its rows. Returns: [R,H]."""
    if fused:
        return _Scatter.apply(x_TH, routes.row_TK)
    return x_TH.index_select(0, routes.token_R)


def gather_rows(rows_RH: Tensor, routes: Routes, add_TH: Tensor | None = None, fused: bool = False) -> Tensor:
    """Sum each token's rows in fp32, and `add` where it is not None. Returns: [T,H] in the rows' dtype."""
    if fused:
        return _Gather.apply(rows_RH, routes.row_TK, add_TH)
    total = rows_RH.to(accumulation_dtype(rows_RH))[routes.row_TK.long()].sum(1)
    return (total if add_TH is None else total + add_TH).to(rows_RH.dtype)


class _Plan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, map_TE: Tensor, probs_TE: Tensor, topk: int) -> tuple[Tensor, ...]:
        from megatron_q3n.kernels.moe import permutation_triton as fused  # late: Triton

        row, expert, token, gates, counts = fused.plan(map_TE.contiguous(), probs_TE.contiguous(), topk)
        ctx.save_for_backward(row, expert)
        ctx.experts = map_TE.shape[1]
        ctx.mark_non_differentiable(row, expert, token, counts)
        return row, expert, token, counts, gates

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        from megatron_q3n.kernels.moe import permutation_triton as fused  # late: Triton

        row, expert = ctx.saved_tensors
        dgates = gradients[4].contiguous()
        return None, fused.gate_gradient(dgates, row, expert, ctx.experts), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, row_TK: Tensor) -> Tensor:
        from megatron_q3n.kernels.moe import permutation_triton as fused  # late: Triton

        ctx.save_for_backward(row_TK)
        return fused.scatter_rows(x_TH.contiguous(), row_TK)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None]:
        from megatron_q3n.kernels.moe import permutation_triton as fused  # late: Triton

        return fused.gather_rows(drows.contiguous(), *ctx.saved_tensors), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, row_TK: Tensor, add_TH: Tensor | None) -> Tensor:
        from megatron_q3n.kernels.moe import permutation_triton as fused  # late: Triton

        ctx.save_for_backward(row_TK)
        add_TH = None if add_TH is None else add_TH.contiguous()
        return fused.gather_rows(rows_RH.contiguous(), row_TK, add_TH)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, Tensor | None]:
        from megatron_q3n.kernels.moe import permutation_triton as fused  # late: Triton

        drows = fused.scatter_rows(dout.contiguous(), *ctx.saved_tensors)
        return drows, None, dout if ctx.needs_input_grad[2] else None
