"""All of the experts in FP8: tokens in, the sum of their experts' outputs out, one launch per product.

Every product runs in e4m3 with one scale per row and per expert; activations and gradients are quantised in the
kernels that make them. Weight gradients sum over rows, which lie first: for them the quantised rows are turned, block
by block, and brought to one scale per expert (`fused/fp8_weight_gradient.py`). All products add up in the tensor cores'
own accumulator, which is fp32 by name and keeps some 14 bits: over at most 2,048 terms, for weight gradients too, whose
longer sums go on in fp32. What was tried, and what the whole gains, is in tools/benchmarks/LOG.md.

Weights are quantised once per step, into copies that stay where they are, so that a captured step reads them. A copy
knows what it was made of: `forget` says that weights may have changed, and a change in place that torch counts shows by
itself. A training pass that finds no current copy renews it (`quantise` does so beforehand, outside of a graph); a pass
that does not train, between steps, makes one for itself.

Where experts are spread over processes the rows arrive sorted already; then each is its own token.

Reference: DeepSeek-V3 (arXiv 2412.19437), section 3.3, for FP8 experts with fine scales; here a scale covers a row.
Shapes: T tokens, R = T·K sorted rows, E experts, H width, F expert width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_q3n.kernels import registry
from megatron_q3n.kernels.moe.permutation import Routes

OPERATION = "fp8 experts"


def fp8_experts(
    x_TH: Tensor,
    gates_R: Tensor,
    fc1_EXH: Tensor,
    fc2_EHF: Tensor,
    routes: Routes | None,
    rows_per_expert_E: Tensor,
    add_TH: Tensor | None = None,
    checking: bool = False,
) -> Tensor:
    """Run the experts, and add `add` where given, which takes routes.

    Shapes: tokens [T,H] with routes, or sorted rows [R,H] without; gates [R]; weights [E,2F,H] and [E,H,F].
    Returns: shaped like x.
    """
    assert checking or registry.lacking((OPERATION,)) == []
    assert add_TH is None or routes is not None
    return _Fp8Experts.apply(
        x_TH.contiguous(),
        gates_R.contiguous(),
        fc1_EXH,
        fc2_EHF,
        routes,
        rows_per_expert_E.to(x_TH.device),
        add_TH,
        torch.is_grad_enabled(),
    )


@dataclass
class WeightCopy:
    """A weight in e4m3, straight and transposed, with the scales of both; and the weight's version it was made of.

    Versions count torch's changes in place. What writes through another view of the memory, as the optimizer does,
    is not counted and has to be told (`forget`).
    """

    both_ways: tuple[Tensor, Tensor, Tensor]
    of_version: int | None = None


def copy_of(weight: Tensor) -> WeightCopy | None:
    """Return the copy that training passes read, if there has been one."""
    return getattr(weight, "fp8_copy", None)


def forget(weights: Iterable[Tensor]) -> None:
    """Say that these weights may have changed: no copy of them is current any more."""
    for weight in weights:
        if (copy := copy_of(weight)) is not None:
            copy.of_version = None


def quantise(weights: Iterable[Tensor]) -> None:
    """Renew, where they are, the copies that are not current of those weights that have some."""
    for weight in weights:
        if (copy := copy_of(weight)) is not None and copy.of_version != weight._version:
            _renew(copy, weight)


def _renew(copy: WeightCopy, weight: Tensor) -> None:
    from megatron_q3n.kernels.moe import fp8_quantize_triton  # late: Triton

    fp8_quantize_triton.quantise_both_ways(weight.detach(), copy.both_ways)
    copy.of_version = weight._version


def _quantised(weight: Tensor, trains: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return a current copy of the weight: the step's, or one for this pass alone."""
    from megatron_q3n.kernels.moe import fp8_quantize_triton  # late: Triton

    copy = copy_of(weight) if trains else None
    if copy is None:
        copy = WeightCopy(fp8_quantize_triton.room_for_both_ways(weight.detach()))
        if trains:
            weight.fp8_copy = copy  # type: ignore[attr-defined]
    if copy.of_version != weight._version:
        _renew(copy, weight)
    return copy.both_ways


class _Fp8Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        routes: Routes | None,
        counts: Tensor,
        add: Tensor | None,
        trains: bool,
    ) -> Tensor:
        from megatron_q3n.kernels.moe import fp8_quantize_triton, permutation_triton  # late: Triton
        from megatron_q3n.kernels.moe.grouped_gemm_triton import row_blocks

        row, token = _each_its_own(x) if routes is None else (routes.row_TK, routes.token_R)
        narrow, scale, kept = fp8_quantize_triton.scatter_quantised(x, row, keep=trains and routes is not None)
        blocks = row_blocks(counts, narrow.shape[0])
        gate_up = _product(narrow, scale, _quantised(fc1, trains), blocks)
        hidden, hidden_scale = fp8_quantize_triton.swiglu_quantised(gate_up, gates)
        out = _product(hidden, hidden_scale, _quantised(fc2, trains), blocks)
        ctx.save_for_backward(kept, scale, gates, row, token, gate_up, hidden, hidden_scale, *blocks.tensors)
        ctx.weights, ctx.routes = (fc1, fc2), routes
        if routes is None:
            return out
        return permutation_triton.gather_rows(out, row, None if add is None else add.contiguous())

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from megatron_q3n.kernels.moe import fp8_quantize_triton, permutation_triton  # late: Triton
        from megatron_q3n.kernels.moe.fp8_wgrad_triton import turned
        from megatron_q3n.kernels.moe.grouped_gemm_triton import RowBlocks

        x, x_scale, gates, row, token, gate_up, hidden, hidden_scale, *lists = ctx.saved_tensors
        blocks = RowBlocks(*lists)
        fc1, fc2 = ctx.weights
        narrow, scale, kept = fp8_quantize_triton.scatter_quantised(dout.contiguous(), row, keep=ctx.routes is not None)
        dhidden = _product(narrow, scale, _quantised(fc2, True), blocks, turned=True)
        needs_fc1, needs_fc2 = ctx.needs_input_grad[2:4]
        dfc1 = dfc2 = None
        if needs_fc2:
            operands = (turned(kept, scale, token, blocks), turned(hidden, hidden_scale, None, blocks))
            dfc2 = _weight_gradient(fc2, *operands, blocks)
        narrow, scale, dgates = fp8_quantize_triton.swiglu_backward_quantised(gate_up, gates, dhidden)
        dx = _product(narrow, scale, _quantised(fc1, True), blocks, turned=True)
        if needs_fc1:
            operands = turned(narrow, scale, None, blocks), turned(x, x_scale, token, blocks)
            dfc1 = _weight_gradient(fc1, *operands, blocks)
        if ctx.routes is not None:
            dx = permutation_triton.gather_rows(dx, row)
        return dx, dgates, dfc1, dfc2, None, None, dout if ctx.needs_input_grad[6] else None, None


def _product(
    rows: Tensor, row_scale: Tensor, weight: tuple[Tensor, Tensor, Tensor], blocks: Any, turned: bool = False
) -> Tensor:
    """Multiply rows by a quantised weight, or by its transpose; both lie with their inputs last, as FP8 wants them."""
    from megatron_q3n.kernels.moe.grouped_gemm_triton import grouped_product  # late: Triton

    straight, transpose, scale_E = weight
    operand = transpose if turned else straight
    return grouped_product(rows, operand, blocks, scales=(row_scale, scale_E))


def _weight_gradient(weight: Tensor, dy: Any, x: Any, blocks: Any) -> Tensor:
    from megatron_q3n.kernels.moe.fp8_wgrad_triton import fp8_weight_gradient  # late: Triton
    from megatron_q3n.kernels.moe.grouped_linear import main_gradient

    target = main_gradient(weight)
    fp8_weight_gradient(dy, x, blocks, target.tensor, target.accumulate)
    return target.for_autograd


def _each_its_own(x: Tensor) -> tuple[Tensor, None]:
    return torch.arange(x.shape[0], dtype=torch.int32, device=x.device)[:, None], None
