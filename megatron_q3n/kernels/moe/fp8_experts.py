"""MoE experts in FP8: tokens in, the sum of their experts' outputs out, one launch per grouped GEMM.

Every GEMM runs in e4m3 with one scale per row and per expert; activations and gradients are quantized in the kernels
that produce them (`fp8_quantize_triton.py`). Weight gradients sum over rows, which are the first dimension: for them
the quantized rows are transposed, block by block, and rescaled to one scale per expert (`fp8_wgrad_triton.py`). All
GEMMs accumulate in the tensor cores' own accumulator, nominally fp32, which keeps some 14 bits: over at most 2,048
terms; longer sums of weight gradients continue in fp32. Alternatives that were measured, and the speedup, are in
tools/benchmarks/LOG.md.

Weights are quantized once per step into copies at fixed addresses, so that a captured step (CUDA graph) reads them. A
copy records the version of its weight: `invalidate_copies` marks all copies as outdated, and an in-place change that
torch counts is detected automatically. A training pass that finds an outdated copy renews it (`quantize_weights` does
so beforehand, outside of a graph); a pass without gradients, between steps, quantizes for itself.

With expert parallelism the rows arrive permuted; then each row is its own token.

Reference: DeepSeek-V3 (arXiv 2412.19437), section 3.3, for FP8 experts with fine-grained scales; here a scale covers a
row.
Shapes: T tokens, R = T·K permuted rows, E experts, H width, F expert width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_q3n.kernels.moe.permutation import Routes


def fp8_experts(
    x_TH: Tensor,
    gates_R: Tensor,
    fc1_EXH: Tensor,
    fc2_EHF: Tensor,
    routes: Routes | None,
    rows_per_expert_E: Tensor,
    add_TH: Tensor | None = None,
) -> Tensor:
    """Run the experts, and add `add` where it is not None, which requires `routes`.

    Shapes: tokens [T,H] with routes, or permuted rows [R,H] without; gates [R]; weights [E,2F,H] and [E,H,F].
    Returns: shaped like x.
    """
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
class Fp8WeightCopy:
    """A weight in e4m3, its transpose, and the scales of both; and the version of the weight it was made from.

    Versions count torch's in-place changes. Writes through another view of the memory, as the optimizer's, are not
    counted and require `invalidate_copies`.
    """

    quantized: tuple[Tensor, Tensor, Tensor]
    source_version: int | None = None


def fp8_copy_of(weight: Tensor) -> Fp8WeightCopy | None:
    """Return the FP8 copy that training passes read, None before the first one."""
    return getattr(weight, "fp8_copy", None)


def invalidate_copies(weights: Iterable[Tensor]) -> None:
    """Mark the FP8 copies of these weights as outdated."""
    for weight in weights:
        if (copy := fp8_copy_of(weight)) is not None:
            copy.source_version = None


def quantize_weights(weights: Iterable[Tensor]) -> None:
    """Renew the outdated FP8 copies of these weights in place; a weight without a copy is skipped."""
    for weight in weights:
        if (copy := fp8_copy_of(weight)) is not None and copy.source_version != weight._version:
            _renew(copy, weight)


def _renew(copy: Fp8WeightCopy, weight: Tensor) -> None:
    from megatron_q3n.kernels.moe import fp8_quantize_triton  # late: Triton

    fp8_quantize_triton.quantize_weight(weight.detach(), copy.quantized)
    copy.source_version = weight._version


def _quantized_weight(weight: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return an up-to-date FP8 copy of the weight: that of the step, or a new one for a pass without gradients."""
    from megatron_q3n.kernels.moe import fp8_quantize_triton  # late: Triton

    copy = fp8_copy_of(weight) if with_gradients else None
    if copy is None:
        copy = Fp8WeightCopy(fp8_quantize_triton.allocate_quantized_weight(weight.detach()))
        if with_gradients:
            weight.fp8_copy = copy  # type: ignore[attr-defined]
    if copy.source_version != weight._version:
        _renew(copy, weight)
    return copy.quantized


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
        with_gradients: bool,
    ) -> Tensor:
        from megatron_q3n.kernels.moe import fp8_quantize_triton, permutation_triton  # late: Triton
        from megatron_q3n.kernels.moe.grouped_gemm_triton import row_blocks

        row, token = _identity_permutation(x) if routes is None else (routes.row_TK, routes.token_R)
        rows_fp8, scale, tokens_fp8 = fp8_quantize_triton.scatter_quantized(
            x, row, keep_tokens=with_gradients and routes is not None
        )
        blocks = row_blocks(counts, rows_fp8.shape[0])
        gate_up = _fp8_grouped_gemm(rows_fp8, scale, _quantized_weight(fc1, with_gradients), blocks)
        hidden, hidden_scale = fp8_quantize_triton.swiglu_quantized(gate_up, gates)
        out = _fp8_grouped_gemm(hidden, hidden_scale, _quantized_weight(fc2, with_gradients), blocks)
        ctx.save_for_backward(tokens_fp8, scale, gates, row, token, gate_up, hidden, hidden_scale, *blocks.tensors)
        ctx.weights, ctx.routes = (fc1, fc2), routes
        if routes is None:
            return out
        return permutation_triton.gather_rows(out, row, None if add is None else add.contiguous())

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from megatron_q3n.kernels.moe import fp8_quantize_triton, permutation_triton  # late: Triton
        from megatron_q3n.kernels.moe.fp8_wgrad_triton import transpose_rows
        from megatron_q3n.kernels.moe.grouped_gemm_triton import RowBlocks

        x, x_scale, gates, row, token, gate_up, hidden, hidden_scale, *lists = ctx.saved_tensors
        blocks = RowBlocks(*lists)
        fc1, fc2 = ctx.weights
        rows_fp8, scale, tokens_fp8 = fp8_quantize_triton.scatter_quantized(
            dout.contiguous(), row, keep_tokens=ctx.routes is not None
        )
        dhidden = _fp8_grouped_gemm(rows_fp8, scale, _quantized_weight(fc2, True), blocks, transposed=True)
        needs_fc1, needs_fc2 = ctx.needs_input_grad[2:4]
        dfc1 = dfc2 = None
        if needs_fc2:
            operands = (
                transpose_rows(tokens_fp8, scale, token, blocks),
                transpose_rows(hidden, hidden_scale, None, blocks),
            )
            dfc2 = _weight_gradient(fc2, *operands, blocks)
        rows_fp8, scale, dgates = fp8_quantize_triton.swiglu_backward_quantized(gate_up, gates, dhidden)
        dx = _fp8_grouped_gemm(rows_fp8, scale, _quantized_weight(fc1, True), blocks, transposed=True)
        if needs_fc1:
            operands = transpose_rows(rows_fp8, scale, None, blocks), transpose_rows(x, x_scale, token, blocks)
            dfc1 = _weight_gradient(fc1, *operands, blocks)
        if ctx.routes is not None:
            dx = permutation_triton.gather_rows(dx, row)
        return dx, dgates, dfc1, dfc2, None, None, dout if ctx.needs_input_grad[6] else None, None


def _fp8_grouped_gemm(
    rows: Tensor, row_scale: Tensor, weight: tuple[Tensor, Tensor, Tensor], blocks: Any, transposed: bool = False
) -> Tensor:
    """Multiply rows by a quantized weight, or by its transpose; the summed dimension is last in both."""
    from megatron_q3n.kernels.moe.grouped_gemm_triton import grouped_gemm  # late: Triton

    weight_fp8, weight_transposed, scale_E = weight
    operand = weight_transposed if transposed else weight_fp8
    return grouped_gemm(rows, operand, blocks, scales=(row_scale, scale_E))


def _weight_gradient(weight: Tensor, dy: Any, x: Any, blocks: Any) -> Tensor:
    from megatron_q3n.kernels.moe.fp8_wgrad_triton import fp8_weight_gradient  # late: Triton
    from megatron_q3n.kernels.moe.grouped_linear import main_gradient

    target = main_gradient(weight)
    fp8_weight_gradient(dy, x, blocks, target.tensor, target.accumulate)
    return target.for_autograd


def _identity_permutation(x: Tensor) -> tuple[Tensor, None]:
    return torch.arange(x.shape[0], dtype=torch.int32, device=x.device)[:, None], None
