"""FP8 experts: precision of quantized rows and weights, weight gradients, and the whole against bf16 experts.

Triton's interpreter truncates where a GPU rounds, so its errors are twice as large. Training
curves in FP8 against bf16 are not covered here (tools/benchmarks/bench.py, tools/benchmarks/LOG.md).
"""

import pytest
import torch
from torch import Tensor

from megatron_q3n.kernels.moe.permutation import Routes

# e4m3 has three fraction bits: relative errors spread evenly up to 2⁻⁴ when rounded
ROUNDED, CUT = 0.03, 0.075


def normal(seed: int, *shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_keeps(fp8: Tensor, scale: Tensor, exact: Tensor, fills: float = 400) -> None:
    error = (fp8.float() * (scale[..., None] if scale.dim() else scale) - exact).norm() / exact.norm()
    assert error < (ROUNDED if fp8.is_cuda else CUT)
    assert fp8.float().abs().amax(-1).gt(fills).all(), "a row (or matrix) does not use the range of e4m3"


def assert_keeps_rows(fp8: Tensor, scale: Tensor, exact: Tensor) -> None:
    """Scales of rows are powers of two."""
    assert_keeps(fp8, scale, exact, fills=200)
    assert scale.log2().frac().eq(0).all()


def routed(device: str, tokens: int, experts: int, topk: int) -> tuple[Routes, Tensor]:
    from megatron_q3n.kernels.moe.permutation import plan_routes

    logits = normal(1, tokens, experts, device=device)
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    chosen.scatter_(1, logits.topk(topk, 1).indices, True)
    return plan_routes(chosen, logits.sigmoid() * chosen, topk, fused=False)


def test_rows_are_quantized(triton_device: str) -> None:
    from megatron_q3n.kernels.moe import fp8_quantize_triton
    from megatron_q3n.kernels.moe.swiglu import swiglu

    routes, gates = routed(triton_device, 37, 6, 2)
    x = normal(2, 37, 48, device=triton_device)
    x *= torch.linspace(-9, 9, 37).exp().to(triton_device)[:, None]
    x[0, 0] = 448 * 2.0**17
    fp8, scale, tokens = fp8_quantize_triton.scatter_quantized(x, routes.row_TK.int(), keep_tokens=True)
    assert_keeps_rows(fp8, scale, x[routes.token_R])
    assert fp8.view(torch.uint8).equal(tokens[routes.token_R].view(torch.uint8))
    gate_up = normal(3, 74, 48, device=triton_device).requires_grad_()
    exact = swiglu(gate_up, gates, fused=False)
    assert_keeps_rows(*fp8_quantize_triton.swiglu_quantized(gate_up.detach(), gates), exact.detach())
    upstream = normal(4, 74, 24, device=triton_device)
    expected = torch.autograd.grad(exact, gate_up, upstream)[0]
    fp8, scale, _ = fp8_quantize_triton.swiglu_backward_quantized(gate_up.detach(), gates, upstream)
    assert_keeps_rows(fp8, scale, expected)


def test_non_finite_rows_stay_non_finite(triton_device: str) -> None:
    """e4m3 has no infinity, and its conversion would give 448: a diverged step must not stay undetected."""
    from megatron_q3n.kernels.moe import fp8_quantize_triton

    x = normal(1, 3, 48, device=triton_device)
    x[0, 5], x[1, 7] = float("inf"), float("nan")
    row_index = torch.arange(3, dtype=torch.int32, device=triton_device)[:, None]
    fp8, scale, _ = fp8_quantize_triton.scatter_quantized(x, row_index, keep_tokens=False)
    rows = fp8.float() * scale[:, None]
    assert not rows[0, 5].isfinite()
    if triton_device == "cuda":  # the interpreter converts it to a number
        assert rows[1, 7].isnan()
    assert rows[2].isfinite().all()


@pytest.mark.parametrize("counts", [[70, 0, 300, 1], [0, 0, 0, 256], [128, 2, 1, 0]])
@pytest.mark.parametrize("with_gather", [False, True])
def test_transposed_rows_are_exact(counts: list[int], with_gather: bool, triton_device: str) -> None:
    """Each expert's rows on its largest scale: exact, but for values below the smallest one of e4m3."""
    from megatron_q3n.kernels.moe.fp8_wgrad_triton import transpose_rows
    from megatron_q3n.kernels.moe.grouped_gemm_triton import BLOCK_R, row_blocks

    rows, width = sum(counts), 80
    fp8 = normal(1, rows, width, device=triton_device).mul(100).to(torch.float8_e4m3fn)
    scale = normal(2, rows, device=triton_device).mul(2).round().exp2()
    source = torch.arange(rows).flip(0).to(triton_device, torch.int32) if with_gather else None
    exact = fp8.float().flip(0) if with_gather else fp8.float()
    blocks = row_blocks(torch.tensor(counts, device=triton_device), rows)
    got = transpose_rows(fp8, scale, source, blocks)
    operand_blocks = got.blocks.view(-1, width, BLOCK_R)
    first = 0
    for expert, (part, scales) in enumerate(zip(exact.split(counts), scale.split(counts))):
        for start in range(0, counts[expert], BLOCK_R):
            largest = scales.max()
            assert got.scale_E[expert] == largest
            expected = (part * (scales / largest)[:, None])[start : start + BLOCK_R]
            operand_block = operand_blocks[first].float().T
            assert not operand_block[len(expected) :].any()
            actual = operand_block[: len(expected)]
            if triton_device == "cpu":  # the interpreter misreads subnormal numbers in fp16
                actual = torch.where(expected.abs() < 2.0**-14, expected, actual)
            torch.testing.assert_close(actual, expected, rtol=0, atol=2.0**-9)
            first += 1
    assert blocks.first_E[-1] == first


@pytest.mark.parametrize("counts", [[70, 0, 300, 1], [0, 0, 0, 256], [3, 2, 1, 0]])
@pytest.mark.parametrize(("accumulate", "at_once"), [(False, 16), (True, 16), (False, 1), (True, 2)])
def test_fp8_weight_gradient_covers_all_tiles(
    counts: list[int], accumulate: bool, at_once: int, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in one part and in several. Operands in fp32 without a GPU: the interpreter has no e4m3 products."""
    from megatron_q3n.kernels.moe import fp8_wgrad_triton as module
    from megatron_q3n.kernels.moe.fp8_wgrad_triton import TransposedRows, fp8_weight_gradient
    from megatron_q3n.kernels.moe.grouped_gemm_triton import BLOCK_R, row_blocks

    monkeypatch.setattr(module, "_BLOCKS_PER_SUM", at_once)
    element = torch.float8_e4m3fn if triton_device == "cuda" else torch.float32
    rows = sum(counts)
    blocks = row_blocks(torch.tensor(counts, device=triton_device), rows)
    capacity = blocks.expert_B.shape[0]
    operand_blocks = [normal(s, capacity * n, BLOCK_R, device=triton_device) for s, n in ((1, 144), (2, 272))]
    dy, x = (operand_block.to(element) for operand_block in operand_blocks)
    used = int(blocks.first_E[-1])
    dy[used * 144 :] = float("nan")  # uninitialized memory
    scales = [torch.rand(4, device=triton_device) + 0.5 for _ in range(2)]
    for scale in scales:
        scale[torch.tensor(counts) == 0] = float("nan")
    out = normal(3, 4, 144, 272, device=triton_device)
    expected = out.double() if accumulate else torch.zeros_like(out, dtype=torch.float64)
    for expert, (first, last) in enumerate(zip(blocks.first_E, blocks.first_E[1:])):
        for block in range(first, last):
            left = dy.view(capacity, 144, BLOCK_R)[block].double()
            right = x.view(capacity, 272, BLOCK_R)[block].double()
            expected[expert] += left @ right.T * scales[0][expert] * scales[1][expert]
    fp8_weight_gradient(TransposedRows(dy, scales[0]), TransposedRows(x, scales[1]), blocks, out, accumulate)
    # Hopper adds e4m3 products up in about 14 bits
    tolerance = 1e-2 if triton_device == "cuda" else 1e-4
    assert (out - expected).norm() < tolerance * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1280, 8192, 32768])
def test_long_sums_of_one_sign_keep_their_size(rows: int) -> None:
    """All rows in one expert: what the tensor cores truncate below 14 bits must not grow with the number of rows."""
    from megatron_q3n.kernels.moe.fp8_wgrad_triton import fp8_weight_gradient, transpose_rows
    from megatron_q3n.kernels.moe.grouped_gemm_triton import row_blocks

    blocks = row_blocks(torch.tensor([rows], device="cuda"), rows)
    dy, x = (normal(s, rows, 256, device="cuda").abs().to(torch.float8_e4m3fn) for s in (1, 2))
    ones, out = torch.ones(rows, device="cuda"), torch.empty(1, 256, 256, device="cuda")
    operands = (transpose_rows(operand, ones, None, blocks) for operand in (dy, x))
    fp8_weight_gradient(*operands, blocks, out, False)
    expected = dy.double().T @ x.double()
    shrunk = 1 - (out[0].double() / expected).mean().item()
    print(f"{rows} rows of one sign: {shrunk:.2%} smaller than their sum")
    assert abs(shrunk) < 0.04


def test_weights_are_quantized_with_their_transpose(triton_device: str) -> None:
    from megatron_q3n.kernels.moe import fp8_quantize_triton

    weight = normal(1, 3, 72, 40, device=triton_device)
    weight *= torch.tensor([1e-3, 1.0, 50.0], device=triton_device)[:, None, None]
    copies = fp8_quantize_triton.allocate_quantized_weight(weight)
    fp8_quantize_triton.quantize_weight(weight, copies)
    straight, transposed, scale = copies
    for expert in range(3):
        expected = weight[expert].flatten()
        assert_keeps(straight[expert].flatten(), scale[expert], expected)
        assert_keeps(transposed[expert].T.flatten(), scale[expert], expected)


def test_a_copy_is_renewed_in_place(triton_device: str) -> None:
    """After invalidation, and after a change that torch counts; a pass without gradients never uses the copy."""
    from megatron_q3n.kernels.moe import fp8_experts, fp8_quantize_triton

    weight = torch.nn.Parameter(normal(1, 2, 64, 64, device=triton_device))

    def is_current(copy: tuple[Tensor, Tensor, Tensor]) -> bool:
        fresh = fp8_quantize_triton.allocate_quantized_weight(weight.detach())
        fp8_quantize_triton.quantize_weight(weight.detach(), fresh)
        return all(a.view(torch.uint8).equal(b.view(torch.uint8)) for a, b in zip(copy, fresh))

    fp8_experts.quantize_weights([weight])
    assert fp8_experts.fp8_copy_of(weight) is None, "made by the first pass that needs it"
    copy_tensors = fp8_experts._quantized_weight(weight, with_gradients=True)
    assert is_current(copy_tensors)
    with torch.no_grad():
        weight.neg_()
    assert not is_current(copy_tensors)
    fp8_experts.quantize_weights([weight])
    assert is_current(copy_tensors)
    weight.data.neg_()  # not counted by torch
    assert is_current(fp8_experts._quantized_weight(weight, with_gradients=False))
    assert not is_current(copy_tensors)
    fp8_experts.invalidate_copies([weight])
    assert fp8_experts._quantized_weight(weight, with_gradients=True)[0] is copy_tensors[0]
    assert is_current(copy_tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("sorted_already", [False, True])
def test_fp8_experts_are_bf16_experts_to_a_few_percent(sorted_already: bool) -> None:
    from megatron_q3n.kernels.moe.fp8_experts import fp8_experts
    from megatron_q3n.kernels.moe.grouped_linear import grouped_linear
    from megatron_q3n.kernels.moe.permutation import gather_rows, scatter_rows
    from megatron_q3n.kernels.moe.swiglu import swiglu

    bf16 = torch.bfloat16
    routes, gates = routed("cuda", 300, 8, 2)
    routes = Routes(routes.row_TK.int(), routes.expert_TK.int(), routes.token_R.int(), routes.rows_per_expert_E)
    x = normal(2, 600 if sorted_already else 300, 256, device="cuda", dtype=bf16)
    fc1 = normal(3, 8, 128, 256, device="cuda", dtype=bf16) / 16
    fc2 = normal(4, 8, 256, 64, device="cuda", dtype=bf16) / 8
    add = None if sorted_already else normal(6, 300, 256, device="cuda", dtype=bf16)
    operand = (x, gates, fc1, fc2) if add is None else (x, gates, fc1, fc2, add)
    leaves = [y.detach().requires_grad_() for y in operand]
    counts = routes.rows_per_expert_E
    rows = leaves[0] if sorted_already else scatter_rows(leaves[0], routes, fused=False)
    hidden = swiglu(grouped_linear(rows, leaves[2], counts, "torch"), leaves[1], fused=False)
    expected = grouped_linear(hidden, leaves[3], counts, "torch")
    if not sorted_already:
        expected = gather_rows(expected, routes, fused=False) + leaves[4]
    where = None if sorted_already else routes
    actual = fp8_experts(*leaves[:4], where, counts, *leaves[4:])
    upstream = normal(5, *expected.shape, device="cuda", dtype=bf16)
    for ours, reference in zip(
        [actual, *torch.autograd.grad(actual, leaves, upstream)],
        [expected, *torch.autograd.grad(expected, leaves, upstream)],
        strict=True,
    ):
        assert (ours - reference).float().norm() / reference.float().norm() < 0.1


@pytest.mark.gpu
def test_evaluation_uses_the_current_weights() -> None:
    """The FP8 copies of a step stay until the next; an evaluation between them must not use the old ones."""
    from megatron_q3n.kernels.moe.fp8_experts import fp8_experts

    bf16 = torch.bfloat16
    x = normal(1, 128, 128, device="cuda", dtype=bf16)
    fc1 = normal(2, 2, 256, 128, device="cuda", dtype=bf16).requires_grad_()
    fc2 = normal(3, 2, 128, 128, device="cuda", dtype=bf16).requires_grad_()
    gates, counts = torch.ones(128, device="cuda"), torch.tensor([64, 64], device="cuda")
    trained = fp8_experts(x, gates, fc1, fc2, None, counts).detach()
    with torch.no_grad():
        fc2 *= 2
        evaluated = fp8_experts(x, gates, fc1, fc2, None, counts)
    assert evaluated.equal(2 * trained)
