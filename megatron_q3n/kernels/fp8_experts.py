"""All of the experts in FP8: tokens in, the sum of their experts' outputs out, one launch per product.

Forward and input-gradient products run in e4m3 with one scale per row and per expert; activations and
gradients are quantised in the kernels that make them, weights once per step. Weight gradients stay in bf16
and add up in fp32. What was tried, and what the whole gains, is in tools/benchmark/LOG.md.

Where experts are spread over processes the rows arrive sorted already; then each is its own token.

Reference: DeepSeek-V3 (arXiv 2412.19437), section 3.3, for FP8 experts with fine scales; here a scale covers a row.
Shapes: T tokens, R = T·K sorted rows, E experts, H width, F expert width.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_q3n.kernels import choices
from megatron_q3n.kernels.permutation import Routes

OPERATION = "fp8 experts"


def fp8_experts(
    x_TH: Tensor, gates_R: Tensor, fc1_EXH: Tensor, fc2_EHF: Tensor, routes: Routes | None,
    rows_per_expert_E: Tensor, checking: bool = False,
) -> Tensor:  # fmt: skip
    """Run the experts.

    Shapes: tokens [T,H] with routes, or sorted rows [R,H] without; gates [R]; weights [E,2F,H] and [E,H,F].
    Returns: shaped like x.
    """
    assert checking or choices.lacking((OPERATION,)) == []
    return _Fp8Experts.apply(
        x_TH.contiguous(), gates_R.contiguous(), fc1_EXH, fc2_EHF, routes,
        rows_per_expert_E.to(x_TH.device), torch.is_grad_enabled(),
    )  # fmt: skip


def forget_quantised(weights: list[Tensor]) -> None:
    """Drop the FP8 copies of weights that are about to change."""
    for weight in weights:
        weight.fp8_both_ways = None  # type: ignore[attr-defined]


class _Fp8Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gates: Tensor, fc1: Tensor, fc2: Tensor, routes: Routes | None, counts: Tensor,
        trains: bool,
    ) -> Tensor:  # fmt: skip
        from megatron_q3n.kernels.fused import fp8_rows, permutation  # late: Triton
        from megatron_q3n.kernels.fused.grouped_product import row_blocks

        row = _each_its_own(x) if routes is None else routes.row_TK
        narrow, scale, rows = fp8_rows.scatter_quantised(x, row, copy=trains and routes is not None)
        blocks = row_blocks(counts, narrow.shape[0])
        gate_up = _product(narrow, scale, _quantised(fc1, trains), blocks)
        hidden, narrow, scale = fp8_rows.swiglu_quantised(gate_up, gates)
        out = _product(narrow, scale, _quantised(fc2, trains), blocks)
        ctx.save_for_backward(
            x if rows is None else rows, gates, row, gate_up, hidden, *blocks.tensors
        )
        ctx.weights, ctx.routes = (fc1, fc2), routes
        return out if routes is None else permutation.gather_rows(out, row)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from megatron_q3n.kernels.fused import fp8_rows, permutation  # late: Triton
        from megatron_q3n.kernels.fused.grouped_product import RowBlocks

        x, gates, row, gate_up, hidden, *lists = ctx.saved_tensors
        blocks = RowBlocks(*lists)
        fc1, fc2 = ctx.weights
        dout = dout.contiguous()
        narrow, scale, rows = fp8_rows.scatter_quantised(dout, row, copy=ctx.routes is not None)
        dhidden = _product(narrow, scale, _quantised(fc2, True), blocks, turned=True)
        dfc2 = _weight_gradient(fc2, dout if rows is None else rows, hidden, blocks.ends_E)
        dgate_up, narrow, scale, dgates = fp8_rows.swiglu_backward_quantised(
            gate_up, gates, dhidden
        )
        dx = _product(narrow, scale, _quantised(fc1, True), blocks, turned=True)
        dfc1 = _weight_gradient(fc1, dgate_up, x, blocks.ends_E)
        if ctx.routes is not None:
            dx = permutation.gather_rows(dx, row)
        return dx, dgates, dfc1, dfc2, None, None, None


def _product(
    rows: Tensor, row_scale: Tensor, weight: tuple[Tensor, Tensor, Tensor], blocks: Any, turned: bool = False
) -> Tensor:  # fmt: skip
    """Multiply rows by a quantised weight, or by its transpose; both lie with their inputs last, as FP8 wants them."""
    from megatron_q3n.kernels.fused.grouped_product import grouped_product  # late: Triton

    straight, transpose, scale_E = weight
    operand = transpose if turned else straight
    return grouped_product(rows, operand, blocks, scales=(row_scale, scale_E))


def _quantised(weight: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a weight, or take this step's copies; an evaluation, between steps, makes its own."""
    from megatron_q3n.kernels.fused import fp8_rows  # late: Triton

    held = getattr(weight, "fp8_both_ways", None) if keep else None
    if held is None:
        held = fp8_rows.quantise_both_ways(weight.detach())
        if keep:
            weight.fp8_both_ways = held  # type: ignore[attr-defined]
    return held


def _weight_gradient(weight: Tensor, dy_RN: Tensor, x_RK: Tensor, ends: Tensor) -> Tensor:
    from megatron_q3n.kernels.fused import grouped_weight_gradient as fused  # late: Triton
    from megatron_q3n.kernels.grouped_linear import main_gradient

    target = main_gradient(weight)
    fused.grouped_weight_gradient(dy_RN, x_RK, ends, target.tensor, target.accumulate)
    return target.for_autograd


def _each_its_own(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0], dtype=torch.int32, device=x.device)[:, None]
