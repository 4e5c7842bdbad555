"""Each fused kernel against its torch reference in fp64, forward and backward, with odd sizes and packed documents.

Without a GPU the kernels run in Triton's interpreter: their arithmetic and indices are tested, not the compiled code
(tests/kernels/startup/test_hopper_compiler.py). Speed is not covered here (tools/benchmarks/bench_kernels.py).
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_q3n.kernels.attention.qkv_norm_rope import qkv_norm_rope
from megatron_q3n.kernels.gated_delta.causal_conv import causal_conv
from megatron_q3n.kernels.gated_delta.operands import DeltaShape
from megatron_q3n.kernels.norms import gated_rms_norm, l2_norm
from megatron_q3n.kernels.residual_norm import residual_norm
from megatron_q3n.packing import Packing

HEADS = {"key_heads": 2, "value_heads": 4, "head_dim": 16}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}

pytestmark = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])


def normal(seed: int, *shape: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_near(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == exact.shape
    error = (actual.double() - exact).norm() / exact.norm().clamp(min=1e-30)
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize(("tokens", "rows", "packed"), [(37, 2, False), (3, 1, False), (52, 1, True)])
def test_delta_inputs(
    tokens: int, rows: int, packed: bool, dtype: torch.dtype, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_q3n.kernels.gated_delta import mixer_inputs_triton as fused

    for launch in (fused._FORWARD, fused._BACKWARD):
        monkeypatch.setitem(launch, "TOKENS_PER_PROGRAM", 16)
    shape, device = DeltaShape(**HEADS), triton_device
    x = normal(1, tokens, rows, shape.channels + 64, device=device, dtype=dtype)
    conv_weight = normal(2, shape.channels, 4, device=device, dtype=dtype)
    ends = [0, 1, 3, 18, 31, 50, 52]  # around the ends of a program's tokens
    packing = Packing.of(ends, device) if packed else None
    position = None if packing is None else packing.position_T
    exact_x, exact_weight = (y.double().requires_grad_() for y in (x, conv_weight))
    convolved = causal_conv(exact_x.transpose(0, 1)[..., : shape.channels], exact_weight, packing=packing)
    query, key, value = (y.unflatten(-1, (-1, 16)) for y in convolved.split([32, 32, 64], -1))
    exact = [l2_norm(query), l2_norm(key), value]
    actual = fused.delta_inputs(x, conv_weight, position, shape)
    for actual_output, expected_output in zip(actual, exact):
        assert_near(actual_output, expected_output, dtype)
    upstream = [normal(i, *y.shape, device=device, dtype=dtype) for i, y in enumerate(exact)]
    expected = torch.autograd.grad(exact, [exact_x, exact_weight], [y.double() for y in upstream])
    dx = torch.full_like(x, float("nan"))
    dconv_weight = fused.delta_inputs_backward(x, conv_weight, position, shape, *upstream, dx)
    assert_near(dx[..., : shape.channels], expected[0][..., : shape.channels], dtype)
    assert dx[..., shape.channels :].isnan().all(), "z's gradient is written by another kernel"
    assert_near(dconv_weight, expected[1], dtype)


def test_delta_gates(dtype: torch.dtype, triton_device: str) -> None:
    from megatron_q3n.kernels.gated_delta import gates_triton as fused

    ba = 8 * normal(1, 75, 2, 12, device=triton_device, dtype=dtype)  # both branches of softplus
    a_log, dt = (normal(s, 6, device=triton_device, dtype=torch.float32) for s in (2, 3))
    exact = [x.double().requires_grad_() for x in (ba, a_log, dt)]
    beta, alpha = exact[0].transpose(0, 1).chunk(2, -1)
    expected_output = [-exact[1].exp() * F.softplus(alpha + exact[2]), beta.sigmoid()]
    for actual_output, reference in zip(fused.delta_gates(ba, a_log, dt, dtype), expected_output):
        assert_near(actual_output, reference, dtype)
    upstream = [normal(s, *expected_output[0].shape, device=triton_device, dtype=torch.float32) for s in (4, 5)]
    expected = torch.autograd.grad(expected_output, exact, [x.double() for x in upstream])
    for actual_output, reference in zip(fused.delta_gates_backward(ba, a_log, dt, *upstream), expected):
        assert_near(actual_output, reference, dtype)


def test_gated_norm(dtype: torch.dtype, triton_device: str) -> None:
    from megatron_q3n.kernels.gated_delta import gated_norm_triton as fused

    device = triton_device
    o = normal(1, 2, 37, 4, 16, device=device, dtype=dtype)
    qkvz = normal(2, 37, 2, 192, device=device, dtype=dtype)
    weight = normal(3, 16, device=device, dtype=torch.float32)
    exact = [x.double().requires_grad_() for x in (o, qkvz, weight)]
    z = exact[1][..., -64:].transpose(0, 1).unflatten(-1, (-1, 16))
    expected_output = gated_rms_norm(exact[0], z, exact[2], 1e-6).flatten(2).transpose(0, 1)
    assert_near(fused.gated_norm(o, qkvz, weight, 1e-6), expected_output, dtype)
    upstream = normal(4, *expected_output.shape, device=device, dtype=dtype)
    expected = torch.autograd.grad(expected_output, exact, upstream.double())
    dqkvz = torch.full_like(qkvz, float("nan"))
    do, dweight = fused.gated_norm_backward(o, qkvz, weight, 1e-6, upstream, dqkvz)
    assert_near(do, expected[0], dtype)
    assert_near(dqkvz[..., -64:], expected[1][..., -64:], dtype)
    assert dqkvz[..., :-64].isnan().all()
    assert_near(dweight, expected[2], dtype)


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(75, 12, 3), (1, 4, 4), (64, 512, 10)])
def test_permutation(tokens: int, experts: int, topk: int, dtype: torch.dtype, triton_device: str) -> None:
    from megatron_q3n.kernels.moe import permutation_triton as fused

    logits = normal(1, tokens, experts, device=triton_device, dtype=torch.float32)
    routing = torch.zeros_like(logits, dtype=torch.bool)
    routing.scatter_(1, logits.topk(topk, 1).indices, True)
    probs = logits.sigmoid() * routing
    row, expert, token_of_row, gate, counts = fused.plan(routing, probs, topk)
    expected_expert, expected_token = routing.T.nonzero().T  # by expert, then token
    token = torch.empty(tokens * topk, dtype=torch.long, device=triton_device)
    token[row.long().flatten()] = torch.arange(tokens, device=triton_device).repeat_interleave(topk)
    assert torch.equal(token, expected_token)
    assert torch.equal(token_of_row.long(), expected_token)
    assert torch.equal(counts.long(), routing.sum(0))
    assert torch.equal(gate, probs.T[routing.T])
    x = normal(2, tokens, 40, device=triton_device, dtype=dtype)
    rows = fused.scatter_rows(x, row)
    assert torch.equal(rows, x[expected_token])
    y, add = (normal(s, n, 40, device=triton_device, dtype=dtype) for s, n in ((3, tokens * topk), (4, tokens)))
    expected_output = add.double().index_add(0, expected_token, y.double())
    assert_near(fused.gather_rows(y, row, add), expected_output, dtype)
    gradient = normal(5, tokens * topk, device=triton_device, dtype=torch.float32)
    dense = torch.zeros_like(probs)
    dense[expected_token, expected_expert] = gradient
    assert torch.equal(fused.gate_gradient(gradient, row, expert, experts), dense)


def test_swiglu(dtype: torch.dtype, triton_device: str) -> None:
    from megatron_q3n.kernels.moe import swiglu_triton as fused

    gate_up = normal(1, 75, 48, device=triton_device, dtype=dtype)
    weight = normal(2, 75, device=triton_device, dtype=torch.float32)
    exact = [x.double().requires_grad_() for x in (gate_up, weight)]
    gate, up = exact[0].chunk(2, -1)
    expected_output = F.silu(gate) * up * exact[1][:, None]
    assert_near(fused.swiglu(gate_up, weight), expected_output, dtype)
    upstream = normal(3, *expected_output.shape, device=triton_device, dtype=dtype)
    expected = torch.autograd.grad(expected_output, exact, upstream.double())
    for actual_output, reference in zip(fused.swiglu_backward(gate_up, weight, upstream), expected):
        assert_near(actual_output, reference, dtype)
    plain = F.silu(gate) * up
    assert_near(fused.swiglu(gate_up, None), plain, dtype)
    (wanted_plain,) = torch.autograd.grad(plain, exact[:1], upstream.double())
    actual_output, no_dweight = fused.swiglu_backward(gate_up, None, upstream)
    assert no_dweight is None
    assert_near(actual_output, wanted_plain, dtype)


def test_shared_expert_gate(dtype: torch.dtype, triton_device: str) -> None:
    from megatron_q3n.kernels.moe import shared_expert_gate_triton as fused

    x, hidden = (normal(s, 37, 40, device=triton_device, dtype=dtype) for s in (1, 2))
    weight = normal(3, 1, 40, device=triton_device, dtype=dtype) / 6
    add = normal(5, 37, 40, device=triton_device, dtype=dtype)
    exact = [y.double().requires_grad_() for y in (x, hidden, weight)]
    expected_output = exact[0] * F.linear(exact[1], exact[2]).sigmoid()
    out, gate = fused.shared_expert_gate(x, hidden, weight)
    assert_near(out, expected_output, dtype)
    assert_near(fused.shared_expert_gate(x, hidden, weight, add)[0], expected_output + add.double(), dtype)
    upstream = normal(4, *expected_output.shape, device=triton_device, dtype=dtype)
    expected = torch.autograd.grad(expected_output, exact, upstream.double())
    for actual_output, reference in zip(fused.shared_expert_gate_backward(x, hidden, weight, gate, upstream), expected):
        assert_near(actual_output.view_as(reference), reference, dtype)


@pytest.mark.parametrize("num_consumers", [1, 2, 3, 4])
@pytest.mark.parametrize("uses_residual", [True, False])
def test_residual_norm(num_consumers: int, uses_residual: bool, dtype: torch.dtype, triton_device: str) -> None:
    """Through autograd; the residual may be unused, and a consumer may have no gradient."""
    x = normal(1, 37, 2, 40, device=triton_device, dtype=dtype)
    weight = normal(2, 40, device=triton_device, dtype=dtype) / 4
    results = []
    for fused, number in ((True, dtype), (False, torch.float64)):
        leaves = [y.to(number).requires_grad_() for y in (x.clone(), weight.clone())]
        residual, *normed = residual_norm(*leaves, 1e-6, num_consumers, fused=fused)
        used = [residual, *normed] if uses_residual else normed[-1:]
        upstream = [normal(3 + i, *x.shape, device=triton_device, dtype=dtype).to(number) for i in range(len(used))]
        results.append([residual, *normed, *torch.autograd.grad(used, leaves, upstream)])
    for actual_output, expected_output in zip(*results, strict=True):
        assert_near(actual_output, expected_output, dtype)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("tokens", "rows"), [(23, 2), (140, 1)])
def test_qkv_norm_rope(tokens: int, rows: int, gated: bool, dtype: torch.dtype, triton_device: str) -> None:
    from megatron_q3n.kernels.attention import qkv_norm_rope_triton as fused

    shape, device = fused.AttentionShape(2, 3, 16, gated), triton_device
    qkv = normal(1, tokens, rows, 2 * sum(shape.sections), device=device, dtype=dtype)
    angles = 3 * normal(2, tokens, 4, device=device, dtype=torch.float32).repeat(1, 2)
    norms = [normal(s, 16, device=device, dtype=dtype) / 4 for s in (3, 4)]
    exact = [y.double().requires_grad_() for y in (qkv, *norms)]
    expected_output = qkv_norm_rope(exact[0], angles.double(), *exact[1:], 2, gated, 1e-6, fused=False)
    outputs = [part for part in expected_output if part is not None]
    upstream = [normal(5 + i, *y.shape, device=device, dtype=dtype) for i, y in enumerate(outputs)]
    expected = torch.autograd.grad(outputs, exact, [y.double() for y in upstream])
    operands = angles.cos(), angles.sin(), *norms, shape, 1e-6
    for actual_output, reference in zip(fused.qkv_norm_rope(qkv, *operands), expected_output):
        assert_near(actual_output, reference, dtype)
    dquery, dkey, dvalue, *dgate = upstream
    back = dquery, dgate[0] if gated else None, dkey, dvalue
    for actual_output, reference in zip(fused.qkv_norm_rope_backward(qkv, *operands, *back), expected):
        assert_near(actual_output, reference, dtype)


@pytest.mark.parametrize("counts", [[70, 0, 129, 1], [0, 0, 0, 64], [3, 2, 1, 0]])
@pytest.mark.parametrize("accumulate", [True, False])
def test_grouped_weight_gradient(counts: list[int], accumulate: bool, dtype: torch.dtype, triton_device: str) -> None:
    from megatron_q3n.kernels.moe.grouped_wgrad_triton import grouped_weight_gradient

    rows = sum(counts)
    # rows behind the last expert's belong to none: a kernel that reads further would differ
    dy, x = (normal(s, rows, n, device=triton_device, dtype=dtype) for s, n in ((1, 72), (2, 264)))
    out = normal(3, 4, 72, 264, device=triton_device, dtype=torch.float32)
    expected_output = out.double() if accumulate else torch.zeros_like(out, dtype=torch.float64)
    start = 0
    for expert, count in enumerate(counts):
        block = slice(start, start + count)
        expected_output[expert] += dy[block].double().T @ x[block].double()
        start += count
    ends = torch.tensor(counts, device=triton_device).cumsum(0).to(torch.int32)
    grouped_weight_gradient(dy, x, ends, out, accumulate)
    tolerance: Any = {"rtol": 1e-5, "atol": 2e-4}
    torch.testing.assert_close(out.double(), expected_output, **tolerance)


@pytest.mark.parametrize("counts", [[70, 0, 300, 1], [0, 0, 0, 256], [3, 2, 1, 0]])
@pytest.mark.parametrize("outputs", [80, 272])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_gemm(
    counts: list[int], outputs: int, transposed: bool, dtype: torch.dtype, triton_device: str
) -> None:
    from megatron_q3n.kernels.moe import grouped_gemm_triton

    rows, experts = sum(counts), len(counts)
    x = normal(1, rows, 192, device=triton_device, dtype=dtype)
    shape = (experts, 192, outputs) if transposed else (experts, outputs, 192)
    weight = normal(2, *shape, device=triton_device, dtype=dtype) / 14
    blocks = grouped_gemm_triton.row_blocks(torch.tensor(counts, device=triton_device), rows)
    assert blocks.ends_E.tolist() == torch.tensor(counts).cumsum(0).tolist()
    assert grouped_gemm_triton.is_tma_aligned(x, weight)
    actual_output = grouped_gemm_triton.grouped_gemm(x, weight, blocks, transposed=transposed)
    matrices = (weight if transposed else weight.transpose(1, 2)).double()
    expected_output = torch.cat([part.double() @ w for part, w in zip(x.split(counts), matrices)])
    assert_near(actual_output, expected_output, dtype)


def test_grouped_gemm_scales(dtype: torch.dtype, triton_device: str) -> None:
    """Scales per row and per expert; operands in the test's dtype, since the interpreter has no e4m3 products."""
    from megatron_q3n.kernels.moe import grouped_gemm_triton

    counts = [5, 140, 0]
    x = normal(1, 145, 64, device=triton_device, dtype=dtype)
    weight = normal(2, 3, 48, 64, device=triton_device, dtype=dtype) / 8
    scales = torch.rand(145, device=triton_device), torch.rand(3, device=triton_device)
    blocks = grouped_gemm_triton.row_blocks(torch.tensor(counts, device=triton_device), 145)
    actual_output = grouped_gemm_triton.grouped_gemm(x, weight, blocks, scales=scales)
    parts = zip(x.double().split(counts), weight.double().transpose(1, 2), scales[1].double())
    expected_output = torch.cat([part @ w * scale for part, w, scale in parts]) * scales[0][:, None]
    torch.testing.assert_close(actual_output.double(), expected_output, rtol=1e-2, atol=1e-2)  # the result is bf16


@pytest.mark.parametrize("shared", ["none", "plain", "gated"])
@pytest.mark.parametrize(("tokens", "hidden", "shared_hidden"), [(1, 24, 40), (5, 40, 24)])
def test_decode_experts(
    tokens: int, hidden: int, shared_hidden: int, shared: str, dtype: torch.dtype, triton_device: str
) -> None:
    from megatron_q3n.kernels.decode.experts import decode_experts
    from megatron_q3n.kernels.decode.operands import ExpertWeights

    def make(seed: int, *shape: int) -> Tensor:
        return normal(seed, *shape, device=triton_device, dtype=dtype) / shape[-1] ** 0.5

    width, experts = 72, 6
    matrices = [make(1, experts, 2 * hidden, width), make(2, experts, width, hidden)]
    if shared != "none":
        matrices += [make(3, 2 * shared_hidden, width), make(4, width, shared_hidden)]
    if shared == "gated":
        matrices.append(make(5, 1, width))
    x, residual = make(6, tokens, width) * 8, make(7, tokens, width) * 4
    chosen = torch.stack([torch.randperm(experts)[:3] for _ in range(tokens)]).to(triton_device)
    gates = torch.rand(tokens, 3, device=triton_device)
    weights = ExpertWeights(*matrices)
    actual_output = decode_experts(x, residual, chosen, gates, weights, fused=True)
    exact = ExpertWeights(*(matrix.double() for matrix in matrices))
    operands = x.double(), residual.double(), chosen, gates.double()
    assert_near(actual_output, decode_experts(*operands, exact, fused=False), dtype)
