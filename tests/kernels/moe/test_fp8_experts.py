"""FP8 rows and weights keep what e4m3 can, weight gradients find their rows, and FP8 experts are experts.

Triton's interpreter cuts numbers off where a GPU rounds them, so its errors are twice as large. Training
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


def assert_keeps(narrow: Tensor, scale: Tensor, exact: Tensor, fills: float = 400) -> None:
    error = (narrow.float() * (scale[..., None] if scale.dim() else scale) - exact).norm() / exact.norm()
    assert error < (ROUNDED if narrow.is_cuda else CUT)
    assert narrow.float().abs().amax(-1).gt(fills).all(), "a row (or matrix) does not use the format's range"


def assert_keeps_rows(narrow: Tensor, scale: Tensor, exact: Tensor) -> None:
    """Scales of rows are powers of two."""
    assert_keeps(narrow, scale, exact, fills=200)
    assert scale.log2().frac().eq(0).all()


def routed(device: str, tokens: int, experts: int, topk: int) -> tuple[Routes, Tensor]:
    from megatron_q3n.kernels.moe.permutation import plan_routes

    logits = normal(1, tokens, experts, device=device)
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    chosen.scatter_(1, logits.topk(topk, 1).indices, True)
    return plan_routes(chosen, logits.sigmoid() * chosen, topk, fused=False)


def test_rows_are_quantised_where_they_are_made(triton_device: str) -> None:
    from megatron_q3n.kernels.moe import fp8_quantize_triton
    from megatron_q3n.kernels.moe.swiglu import weighted_swiglu

    routes, gates = routed(triton_device, 37, 6, 2)
    x = normal(2, 37, 48, device=triton_device)
    x *= torch.linspace(-9, 9, 37).exp().to(triton_device)[:, None]
    x[0, 0] = 448 * 2.0**17  # the largest that its scale serves
    narrow, scale, tokens = fp8_quantize_triton.scatter_quantised(x, routes.row_TK.int(), keep=True)
    assert_keeps_rows(narrow, scale, x[routes.token_R])
    assert narrow.view(torch.uint8).equal(tokens[routes.token_R].view(torch.uint8))
    gate_up = normal(3, 74, 48, device=triton_device).requires_grad_()
    exact = weighted_swiglu(gate_up, gates, fused=False)
    assert_keeps_rows(*fp8_quantize_triton.swiglu_quantised(gate_up.detach(), gates), exact.detach())
    upstream = normal(4, 74, 24, device=triton_device)
    wanted = torch.autograd.grad(exact, gate_up, upstream)[0]
    narrow, scale, _ = fp8_quantize_triton.swiglu_backward_quantised(gate_up.detach(), gates, upstream)
    assert_keeps_rows(narrow, scale, wanted)


def test_what_is_not_finite_stays_so(triton_device: str) -> None:
    """e4m3 has no infinity, and its conversion would make 448 of one: a step must not go on as if nothing were."""
    from megatron_q3n.kernels.moe import fp8_quantize_triton

    x = normal(1, 3, 48, device=triton_device)
    x[0, 5], x[1, 7] = float("inf"), float("nan")
    places = torch.arange(3, dtype=torch.int32, device=triton_device)[:, None]
    narrow, scale, _ = fp8_quantize_triton.scatter_quantised(x, places, keep=False)
    rows = narrow.float() * scale[:, None]
    assert not rows[0, 5].isfinite()
    if triton_device == "cuda":  # the interpreter makes a number of it
        assert rows[1, 7].isnan()
    assert rows[2].isfinite().all()


@pytest.mark.parametrize("counts", [[70, 0, 300, 1], [0, 0, 0, 256], [128, 2, 1, 0]])
@pytest.mark.parametrize("gathers", [False, True])
def test_turned_rows_lose_nothing(counts: list[int], gathers: bool, triton_device: str) -> None:
    """Each expert's rows on its largest scale: exact, but for what lies below the smallest that e4m3 can hold."""
    from megatron_q3n.kernels.moe.fp8_wgrad_triton import turned
    from megatron_q3n.kernels.moe.grouped_gemm_triton import BLOCK_R, row_blocks

    rows, width = sum(counts), 80
    narrow = normal(1, rows, width, device=triton_device).mul(100).to(torch.float8_e4m3fn)
    scale = normal(2, rows, device=triton_device).mul(2).round().exp2()
    lines = torch.arange(rows).flip(0).to(triton_device, torch.int32) if gathers else None
    exact = narrow.float().flip(0) if gathers else narrow.float()
    blocks = row_blocks(torch.tensor(counts, device=triton_device), rows)
    got = turned(narrow, scale, lines, blocks)
    pieces = got.pieces.view(-1, width, BLOCK_R)
    first = 0
    for expert, (part, scales) in enumerate(zip(exact.split(counts), scale.split(counts))):
        for start in range(0, counts[expert], BLOCK_R):
            largest = scales.max()
            assert got.scale_E[expert] == largest
            wanted = (part * (scales / largest)[:, None])[start : start + BLOCK_R]
            piece = pieces[first].float().T
            assert not piece[len(wanted) :].any()
            found = piece[: len(wanted)]
            if triton_device == "cpu":  # the interpreter misreads subnormal numbers in fp16
                found = torch.where(wanted.abs() < 2.0**-14, wanted, found)
            torch.testing.assert_close(found, wanted, rtol=0, atol=2.0**-9)
            first += 1
    assert blocks.first_E[-1] == first


@pytest.mark.parametrize("counts", [[70, 0, 300, 1], [0, 0, 0, 256], [3, 2, 1, 0]])
@pytest.mark.parametrize(("accumulate", "at_once"), [(False, 16), (True, 16), (False, 1), (True, 2)])
def test_fp8_weight_gradient_walks_all_tiles(
    counts: list[int], accumulate: bool, at_once: int, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in one piece and in several. Operands in fp32 without a GPU: the interpreter has no e4m3 products."""
    from megatron_q3n.kernels.moe import fp8_wgrad_triton as module
    from megatron_q3n.kernels.moe.fp8_wgrad_triton import Turned, fp8_weight_gradient
    from megatron_q3n.kernels.moe.grouped_gemm_triton import BLOCK_R, row_blocks

    monkeypatch.setattr(module, "_BLOCKS_AT_ONCE", at_once)
    element = torch.float8_e4m3fn if triton_device == "cuda" else torch.float32
    rows = sum(counts)
    blocks = row_blocks(torch.tensor(counts, device=triton_device), rows)
    room = blocks.expert_B.shape[0]
    pieces = [normal(s, room * n, BLOCK_R, device=triton_device) for s, n in ((1, 144), (2, 272))]
    dy, x = (piece.to(element) for piece in pieces)
    used = int(blocks.first_E[-1])
    dy[used * 144 :] = float("nan")  # what nobody wrote
    scales = [torch.rand(4, device=triton_device) + 0.5 for _ in range(2)]
    for scale in scales:
        scale[torch.tensor(counts) == 0] = float("nan")
    out = normal(3, 4, 144, 272, device=triton_device)
    wanted = out.double() if accumulate else torch.zeros_like(out, dtype=torch.float64)
    for expert, (first, last) in enumerate(zip(blocks.first_E, blocks.first_E[1:])):
        for block in range(first, last):
            left = dy.view(room, 144, BLOCK_R)[block].double()
            right = x.view(room, 272, BLOCK_R)[block].double()
            wanted[expert] += left @ right.T * scales[0][expert] * scales[1][expert]
    fp8_weight_gradient(Turned(dy, scales[0]), Turned(x, scales[1]), blocks, out, accumulate)
    # Hopper adds e4m3 products up in about 14 bits
    tolerance = 1e-2 if triton_device == "cuda" else 1e-4
    assert (out - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1280, 8192, 32768])
def test_long_sums_of_one_sign_keep_their_size(rows: int) -> None:
    """Of all rows in one expert: what the tensor cores drop below their 14 bits must not grow with the rows."""
    from megatron_q3n.kernels.moe.fp8_wgrad_triton import fp8_weight_gradient, turned
    from megatron_q3n.kernels.moe.grouped_gemm_triton import row_blocks

    blocks = row_blocks(torch.tensor([rows], device="cuda"), rows)
    dy, x = (normal(s, rows, 256, device="cuda").abs().to(torch.float8_e4m3fn) for s in (1, 2))
    ones, out = torch.ones(rows, device="cuda"), torch.empty(1, 256, 256, device="cuda")
    operands = (turned(given, ones, None, blocks) for given in (dy, x))
    fp8_weight_gradient(*operands, blocks, out, False)
    wanted = dy.double().T @ x.double()
    shrunk = 1 - (out[0].double() / wanted).mean().item()
    print(f"{rows} rows of one sign: {shrunk:.2%} smaller than their sum")
    assert abs(shrunk) < 0.04


def test_weights_are_quantised_both_ways(triton_device: str) -> None:
    from megatron_q3n.kernels.moe import fp8_quantize_triton

    weight = normal(1, 3, 72, 40, device=triton_device)
    weight *= torch.tensor([1e-3, 1.0, 50.0], device=triton_device)[:, None, None]
    copies = fp8_quantize_triton.room_for_both_ways(weight)
    fp8_quantize_triton.quantise_both_ways(weight, copies)
    straight, turned, scale = copies
    for expert in range(3):
        wanted = weight[expert].flatten()
        assert_keeps(straight[expert].flatten(), scale[expert], wanted)
        assert_keeps(turned[expert].T.flatten(), scale[expert], wanted)


def test_a_copy_is_renewed_where_it_lies(triton_device: str) -> None:
    """When told, and when torch counts a change; a pass that does not train trusts no copy at all."""
    from megatron_q3n.kernels.moe import fp8_experts, fp8_quantize_triton

    weight = torch.nn.Parameter(normal(1, 2, 64, 64, device=triton_device))

    def is_of_now(copy: tuple[Tensor, Tensor, Tensor]) -> bool:
        fresh = fp8_quantize_triton.room_for_both_ways(weight.detach())
        fp8_quantize_triton.quantise_both_ways(weight.detach(), fresh)
        return all(a.view(torch.uint8).equal(b.view(torch.uint8)) for a, b in zip(copy, fresh))

    fp8_experts.quantise([weight])
    assert fp8_experts.copy_of(weight) is None, "made by the first pass that needs it"
    kept = fp8_experts._quantised(weight, trains=True)
    assert is_of_now(kept)
    with torch.no_grad():
        weight.neg_()
    assert not is_of_now(kept)
    fp8_experts.quantise([weight])
    assert is_of_now(kept)
    weight.data.neg_()  # unseen
    assert is_of_now(fp8_experts._quantised(weight, trains=False))
    assert not is_of_now(kept)
    fp8_experts.forget([weight])
    assert fp8_experts._quantised(weight, trains=True)[0] is kept[0]
    assert is_of_now(kept)


@pytest.mark.gpu
@pytest.mark.parametrize("sorted_already", [False, True])
def test_fp8_experts_are_bf16_experts_to_a_few_percent(sorted_already: bool) -> None:
    from megatron_q3n.kernels.moe.fp8_experts import fp8_experts
    from megatron_q3n.kernels.moe.grouped_linear import grouped_linear
    from megatron_q3n.kernels.moe.permutation import gather_rows, scatter_rows
    from megatron_q3n.kernels.moe.swiglu import weighted_swiglu

    bf16 = torch.bfloat16
    routes, gates = routed("cuda", 300, 8, 2)
    routes = Routes(routes.row_TK.int(), routes.expert_TK.int(), routes.token_R.int(), routes.rows_per_expert_E)
    x = normal(2, 600 if sorted_already else 300, 256, device="cuda", dtype=bf16)
    fc1 = normal(3, 8, 128, 256, device="cuda", dtype=bf16) / 16
    fc2 = normal(4, 8, 256, 64, device="cuda", dtype=bf16) / 8
    add = None if sorted_already else normal(6, 300, 256, device="cuda", dtype=bf16)
    given = (x, gates, fc1, fc2) if add is None else (x, gates, fc1, fc2, add)
    leaves = [y.detach().requires_grad_() for y in given]
    counts = routes.rows_per_expert_E
    rows = leaves[0] if sorted_already else scatter_rows(leaves[0], routes, fused=False)
    hidden = weighted_swiglu(grouped_linear(rows, leaves[2], counts), leaves[1], fused=False)
    wanted = grouped_linear(hidden, leaves[3], counts)
    if not sorted_already:
        wanted = gather_rows(wanted, routes, fused=False) + leaves[4]
    where = None if sorted_already else routes
    found = fp8_experts(*leaves[:4], where, counts, *leaves[4:], checking=True)
    upstream = normal(5, *wanted.shape, device="cuda", dtype=bf16)
    for ours, reference in zip(
        [found, *torch.autograd.grad(found, leaves, upstream)],
        [wanted, *torch.autograd.grad(wanted, leaves, upstream)],
        strict=True,
    ):
        assert (ours - reference).float().norm() / reference.float().norm() < 0.1


@pytest.mark.gpu
def test_an_evaluation_sees_the_weights_of_now() -> None:
    """A step keeps its FP8 copies until the next; an evaluation between them must not take the old ones."""
    from megatron_q3n.kernels.moe.fp8_experts import fp8_experts

    bf16 = torch.bfloat16
    x = normal(1, 128, 128, device="cuda", dtype=bf16)
    fc1 = normal(2, 2, 256, 128, device="cuda", dtype=bf16).requires_grad_()
    fc2 = normal(3, 2, 128, 128, device="cuda", dtype=bf16).requires_grad_()
    gates, counts = torch.ones(128, device="cuda"), torch.tensor([64, 64], device="cuda")
    trained = fp8_experts(x, gates, fc1, fc2, None, counts, checking=True).detach()
    with torch.no_grad():
        fc2 *= 2
        evaluated = fp8_experts(x, gates, fc1, fc2, None, counts, checking=True)
    assert evaluated.equal(2 * trained)
