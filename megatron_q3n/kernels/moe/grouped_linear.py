"""Grouped linear layer of the experts: permuted rows sorted by expert, one weight matrix per expert.

On a GPU in bf16 each grouped GEMM is one launch for all experts: our kernel, or `torch._grouped_mm` for shapes that the
kernel does not support (offsets stay on the device in both, without host synchronization). Elsewhere it is a loop over
experts, which suits the few and small experts of a laptop run.

Gradient accumulation: the weight gradient is added directly to the fp32 main gradient of megatron-core's DDP, without
a bf16 copy. The first micro-batch of a step overwrites the main gradient (`mark_overwrite`), the others accumulate, so
gigabytes of gradients need not be cleared and read back at every step.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["triton", "torch", "loop"]
"""Our Triton kernel; `torch._grouped_mm`, on a GPU in bf16; one GEMM per expert."""


def grouped_linear(rows_TK: Tensor, weight_ENK: Tensor, rows_per_expert_E: Tensor, backend: Backend = "loop") -> Tensor:
    """Multiply the rows of each expert with the expert's matrix.

    Shapes: rows [T,K], the first rows_per_expert[0] of them for expert 0, and so on; weight [E,N,K].
    Returns: [T,N].
    """
    if backend == "triton":
        return _GroupedLinear.apply(rows_TK, weight_ENK, rows_per_expert_E.to(rows_TK.device))
    clear_if_not_accumulated(weight_ENK)
    if backend == "torch":
        ends_E = rows_per_expert_E.to(rows_TK.device).cumsum(0).to(torch.int32)
        return torch._grouped_mm(rows_TK, weight_ENK.transpose(1, 2), offs=ends_E)
    blocks = rows_TK.split(rows_per_expert_E.tolist())
    return torch.cat([F.linear(block, weight) for block, weight in zip(blocks, weight_ENK.unbind())])


def mark_overwrite(weights: list[Tensor]) -> None:
    """Mark main gradients as those of the last step: the next backward pass overwrites them instead of accumulating."""
    for weight in weights:
        weight.overwrite_main_grad = True  # type: ignore[attr-defined]


def mark_accumulate(weights: list[Tensor]) -> None:
    """Mark main gradients as those of this step: the next backward pass accumulates into them."""
    for weight in weights:
        weight.overwrite_main_grad = False  # type: ignore[attr-defined]


def overwrites_main_grad(weight: Tensor) -> bool:
    """Return whether the weight's main gradient is that of the last step and will be overwritten."""
    return getattr(weight, "overwrite_main_grad", False)


def clear_if_not_accumulated(weight: Tensor) -> None:
    """Clear a main gradient still marked for overwriting: its weight was unused, or used by a path that accumulates."""
    if overwrites_main_grad(weight):
        weight.main_grad.zero_()  # type: ignore[attr-defined]
        mark_accumulate([weight])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TK: Tensor, weight_ENK: Tensor, counts_E: Tensor) -> Tensor:
        from megatron_q3n.kernels.moe import grouped_gemm_triton  # late: Triton

        blocks = grouped_gemm_triton.row_blocks(counts_E, rows_TK.shape[0])
        ctx.save_for_backward(rows_TK, *blocks.tensors)
        # the parameter itself, whose attribute `main_grad` the backward pass needs
        ctx.weight = weight_ENK
        return _grouped_gemm(rows_TK.contiguous(), weight_ENK.detach(), blocks, transposed=False)

    @staticmethod
    def backward(ctx: Any, dout_TN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        from megatron_q3n.kernels.moe import grouped_gemm_triton  # late: Triton

        rows_TK, *lists = ctx.saved_tensors
        weight, dout_TN = ctx.weight, dout_TN.contiguous()
        blocks = grouped_gemm_triton.RowBlocks(*lists)
        drows = dweight = None
        if ctx.needs_input_grad[0]:
            drows = _grouped_gemm(dout_TN, weight.detach(), blocks, transposed=True)
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(dout_TN, rows_TK, blocks.ends_E, weight)
        return drows, dweight, None


def _grouped_gemm(rows_RK: Tensor, weight: Tensor, blocks: Any, transposed: bool) -> Tensor:
    """Multiply by a weight [E,N,K], or [E,K,N] if `transposed`."""
    from megatron_q3n.kernels.moe import grouped_gemm_triton  # late: Triton

    if grouped_gemm_triton.is_tma_aligned(rows_RK, weight):
        return grouped_gemm_triton.grouped_gemm(rows_RK, weight, blocks, transposed=transposed)
    operand = weight if transposed else weight.transpose(1, 2)
    return torch._grouped_mm(rows_RK, operand, offs=blocks.ends_E)


def _weight_gradient(dout_TN: Tensor, rows_TK: Tensor, ends_E: Tensor, weight: Tensor) -> Tensor:
    from megatron_q3n.kernels.moe.grouped_wgrad_triton import grouped_weight_gradient

    target = main_gradient(weight)
    grouped_weight_gradient(dout_TN, rows_TK.contiguous(), ends_E, target.tensor, target.accumulate)
    return target.for_autograd


@dataclass(frozen=True)
class GradientTarget:
    """Destination of a weight gradient: buffer, overwrite or accumulate, and the tensor returned to autograd."""

    tensor: Tensor
    accumulate: bool
    for_autograd: Tensor


def main_gradient(weight: Tensor) -> GradientTarget:
    """Return the weight's main gradient as a kernel's destination, and mark it as accumulated by this step.

    As megatron-core's gradient accumulation fusion, it sets `grad_added_to_main_grad`.
    """
    main = getattr(weight, "main_grad", None)
    if main is None:
        fresh = torch.empty_like(weight)
        return GradientTarget(fresh, False, fresh)
    overwrite = overwrites_main_grad(weight)
    mark_accumulate([weight])
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # DDP's hook must still run, and autograd passes it some gradient. The hook discards it unread, so the weight's own
    # memory serves; a separate tensor would take as much memory as all experts of a layer.
    return GradientTarget(main, not overwrite, weight.detach())
