"""Many experts' matrix products in one call: rows sorted by expert, one weight matrix per expert.

On a GPU in bf16 each product is one launch for all experts: our kernels, or `torch._grouped_mm` where they do not
fit (offsets stay on the device in both). The weight gradient's adds to the
fp32 main gradient of megatron-core's DDP instead of making a bf16 copy first. The first micro-batch
of a step writes where the others add, so that nobody has to fill gigabytes with zeros before it and
read them back (`mark_stale`). Elsewhere it is a loop over experts, which is right for the few and
small experts of a laptop run.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels import registry

OPERATION = "grouped products"


def grouped_linear(rows_TK: Tensor, weight_ENK: Tensor, rows_per_expert_E: Tensor, fused: bool | None = None) -> Tensor:
    """Multiply each expert's block of rows with its own matrix.

    Shapes: rows [T,K], the first rows_per_expert[0] of them for expert 0, and so on; weight [E,N,K].
    `fused` forces the choice of kernels that `choices` makes otherwise.
    Returns: [T,N].
    """
    if not registry.is_fused(OPERATION, rows_TK, fused):
        settle(weight_ENK)
    if rows_TK.is_cuda and rows_TK.dtype == torch.bfloat16:
        counts_E = rows_per_expert_E.to(rows_TK.device)
        if registry.is_fused(OPERATION, rows_TK, fused):
            return _OneLaunch.apply(rows_TK, weight_ENK, counts_E)
        ends_E = counts_E.cumsum(0).to(torch.int32)
        return torch._grouped_mm(rows_TK, weight_ENK.transpose(1, 2), offs=ends_E)
    blocks = rows_TK.split(rows_per_expert_E.tolist())
    return torch.cat([F.linear(block, weight) for block, weight in zip(blocks, weight_ENK.unbind())])


def mark_stale(weights: list[Tensor]) -> None:
    """Say that what the main gradients of these hold belongs to the last step: to be overwritten, not added to."""
    for weight in weights:
        weight.main_grad_is_stale = True  # type: ignore[attr-defined]


def mark_fresh(weights: list[Tensor]) -> None:
    """Say that the main gradients of these are this step's."""
    for weight in weights:
        weight.main_grad_is_stale = False  # type: ignore[attr-defined]


def is_stale(weight: Tensor) -> bool:
    """Whether the weight's main gradient is still the last step's."""
    return getattr(weight, "main_grad_is_stale", False)


def settle(weight: Tensor) -> None:
    """Clear a main gradient that is still stale: its weight was not used, or by a path that only adds."""
    if is_stale(weight):
        weight.main_grad.zero_()  # type: ignore[attr-defined]
        mark_fresh([weight])


class _OneLaunch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TK: Tensor, weight_ENK: Tensor, counts_E: Tensor) -> Tensor:
        from megatron_q3n.kernels.moe import grouped_gemm_triton  # late: Triton

        blocks = grouped_gemm_triton.row_blocks(counts_E, rows_TK.shape[0])
        ctx.save_for_backward(rows_TK, *blocks.tensors)
        ctx.weight = weight_ENK  # the parameter itself, which knows its main gradient
        return _product(rows_TK.contiguous(), weight_ENK.detach(), blocks, turned=False)

    @staticmethod
    def backward(ctx: Any, dout_TN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        from megatron_q3n.kernels.moe import grouped_gemm_triton  # late: Triton

        rows_TK, *lists = ctx.saved_tensors
        weight, dout_TN = ctx.weight, dout_TN.contiguous()
        blocks = grouped_gemm_triton.RowBlocks(*lists)
        drows = dweight = None
        if ctx.needs_input_grad[0]:
            drows = _product(dout_TN, weight.detach(), blocks, turned=True)
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(dout_TN, rows_TK, blocks.ends_E, weight)
        return drows, dweight, None


def _product(rows_RK: Tensor, weight: Tensor, blocks: Any, turned: bool) -> Tensor:
    """Multiply by [E,N,K], or by [E,K,N] if `turned`."""
    from megatron_q3n.kernels.moe import grouped_gemm_triton  # late: Triton

    if grouped_gemm_triton.fits(rows_RK, weight):
        return grouped_gemm_triton.grouped_product(rows_RK, weight, blocks, turned=turned)
    right = weight if turned else weight.transpose(1, 2)
    return torch._grouped_mm(rows_RK, right, offs=blocks.ends_E)


def _weight_gradient(dout_TN: Tensor, rows_TK: Tensor, ends_E: Tensor, weight: Tensor) -> Tensor:
    from megatron_q3n.kernels.moe.grouped_wgrad_triton import grouped_weight_gradient

    target = main_gradient(weight)
    grouped_weight_gradient(dout_TN, rows_TK.contiguous(), ends_E, target.tensor, target.accumulate)
    return target.for_autograd


@dataclass(frozen=True)
class GradientTarget:
    """Where a weight's gradient goes, whether what is there counts, and what autograd is given."""

    tensor: Tensor
    accumulate: bool
    for_autograd: Tensor


def main_gradient(weight: Tensor) -> GradientTarget:
    """Name the weight's main gradient, as megatron-core's fused linears do, and claim it for a kernel's result."""
    main = getattr(weight, "main_grad", None)
    if main is None:
        fresh = torch.empty_like(weight)
        return GradientTarget(fresh, False, fresh)
    stale = is_stale(weight)
    mark_fresh([weight])
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # DDP's hook must still be called, and autograd calls it with some gradient. The hook drops it unread, so the
    # weight's own memory will do; a tensor of its own would cost as much as all experts of a layer.
    return GradientTarget(main, not stale, weight.detach())
