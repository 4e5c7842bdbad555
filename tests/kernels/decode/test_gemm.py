"""Decode GEMM, fused, against torch in fp64: all combinations of norm, second input, second weight and residual.

Without a GPU the kernel runs in Triton's interpreter, in fp32. Compiled code:
tests/kernels/startup/test_hopper_compiler.py; use in the model: test_launches.py; bf16 on a GPU: the start-up check,
tests/inference/test_gpu.py.
"""

import pytest
import torch
from torch import Tensor

from megatron_q3n.config.execution_plan import Kernel
from megatron_q3n.kernels.decode.gemm import decode_gemm, decode_gemm_reference, max_rows
from megatron_q3n.kernels.decode.operands import GemmInput, GemmOutput, RMSNormWeights
from tests.execution_plans import fused_plan
from tests.inference.tiny_model import tiny_config

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
# rows, width, output width: partial blocks, widths of several blocks, sizes of one
SIZES = [(1, 512, 40), (2, 40, 1), (3, 1030, 67), (5, 16, 300), (8, 96, 20), (16, 70, 9)]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])


def normal(seed: int, *shape: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def random_input(seed: int, rows: int, width: int, normed: bool, **kind: object) -> GemmInput:
    """Return rows of a wider tensor, so that they are not contiguous."""
    x = normal(seed, rows, width + 24, **kind)[:, 8 : 8 + width]  # type: ignore[arg-type]
    norm = RMSNormWeights(0.2 * normal(seed + 1, width, **kind), 1e-3)  # type: ignore[arg-type]
    return GemmInput(x, norm if normed else None)


def in_fp64(rows: GemmInput | None) -> GemmInput | None:
    if rows is None:
        return None
    norm = rows.norm and RMSNormWeights(rows.norm.weight_X.double(), rows.norm.eps, rows.norm.offset)
    return GemmInput(rows.x_RX.double(), norm)


def assert_near(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == exact.shape
    error = (actual.double() - exact).norm() / exact.norm().clamp(min=1e-30)
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


def run_both(rows: GemmInput, weight: Tensor, **options: Tensor | GemmInput | bool | None) -> list[GemmOutput]:
    """Return the results of the kernel, and of torch in fp64."""
    operands = {
        "second": None,
        "second_weight_MK": None,
        "residual_RN": None,
        "returns_normed": False,
        "fp32_output": False,
    }
    operands |= options  # type: ignore[arg-type]
    exact = {
        name: in_fp64(x) if isinstance(x, GemmInput) else x.double() if isinstance(x, Tensor) else x
        for name, x in operands.items()
    }
    exact_input = in_fp64(rows)
    assert exact_input is not None
    expected = decode_gemm_reference(exact_input, weight.double(), **exact)  # type: ignore[arg-type]
    return [decode_gemm(rows, weight, **operands, fused=True), expected]  # type: ignore[arg-type]


@each_dtype
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("rows", "width", "outputs"), SIZES)
def test_gemm_and_residual(
    rows: int, width: int, outputs: int, normed: bool, dtype: torch.dtype, triton_device: str
) -> None:
    kind = {"device": triton_device, "dtype": dtype}
    operands = random_input(1, rows, width, normed, **kind)
    weight = normal(3, outputs, width, **kind)
    actual, expected = run_both(operands, weight)
    assert actual.out_RN.dtype == dtype
    assert_near(actual.out_RN, expected.out_RN, dtype)
    residual = normal(4, rows, 2 * outputs, **kind)[:, :outputs]
    before = residual.clone()
    actual, expected = run_both(operands, weight, residual_RN=residual)
    assert_near(actual.out_RN, expected.out_RN, dtype)
    assert torch.equal(residual, before)


@each_dtype
@pytest.mark.parametrize(("rows", "width", "outputs"), SIZES)
def test_second_weight_and_normed_rows(
    rows: int, width: int, outputs: int, dtype: torch.dtype, triton_device: str
) -> None:
    """The second weight has fewer rows than a block, and more than two blocks."""
    kind = {"device": triton_device, "dtype": dtype}
    operands = random_input(1, rows, width, True, **kind)
    weight = normal(3, outputs, width, **kind)
    for second_width in (1, 18):
        actual, expected = run_both(
            operands, weight, second_weight_MK=normal(5, second_width, width, **kind), returns_normed=True
        )
        for name in ("out_RN", "second_out_RM", "normed_RX"):
            assert_near(getattr(actual, name), getattr(expected, name), dtype)
    actual, expected = run_both(operands, weight, returns_normed=True, fp32_output=True)
    assert actual.out_RN.dtype == torch.float32
    assert_near(actual.out_RN, expected.out_RN, dtype)


@each_dtype
@pytest.mark.parametrize("normed", [True, False])
def test_second_input_of_another_width(normed: bool, dtype: torch.dtype, triton_device: str) -> None:
    kind = {"device": triton_device, "dtype": dtype}
    for rows, first_width, second_width, outputs in ((1, 96, 96, 12), (4, 33, 600, 7), (9, 600, 5, 30)):
        operands = random_input(1, rows, first_width, normed, **kind)
        second = random_input(6, rows, second_width, normed, **kind)
        weight = normal(3, outputs, first_width + second_width, **kind)
        actual, expected = run_both(operands, weight, second=second)
        assert_near(actual.out_RN, expected.out_RN, dtype)


def test_zeros_stay_finite(triton_device: str) -> None:
    """The padding rows of a CUDA graph are zeros."""
    kind = {"device": triton_device, "dtype": torch.float32}
    rows = GemmInput(torch.zeros(2, 64, **kind), RMSNormWeights(torch.ones(64, **kind), 1e-6))  # type: ignore[arg-type]
    output = decode_gemm(rows, normal(1, 10, 64, **kind), returns_normed=True, fused=True)  # type: ignore[arg-type]
    assert output.normed_RX is not None
    assert output.out_RN.eq(0).all()
    assert output.normed_RX.eq(0).all()


def test_the_plan_the_rows_and_gradients_decide() -> None:
    """Not without a qualified kernel, not for many rows of any of the weights, not with gradients."""
    from megatron_q3n.model.decode.fused_linear import uses_decode_gemm

    x, weight, wide_weight = torch.zeros(5, 1, 96), torch.zeros(40, 96), torch.zeros(8, 1030)
    decode = fused_plan(tiny_config(), {Kernel.DECODE_GEMM}).decode
    with torch.no_grad():
        assert not uses_decode_gemm(fused_plan(tiny_config(), ()).decode, x, weight), "no kernel is qualified"
        assert uses_decode_gemm(decode, x, weight)
        assert uses_decode_gemm(decode, x, weight, weight)
        assert not uses_decode_gemm(decode, torch.zeros(6, 96), weight), "many rows are for tensor cores"
        assert not uses_decode_gemm(decode, x, weight, wide_weight), "wide weights have fewer rows"
    assert not uses_decode_gemm(decode, x, weight), "with gradients"


@pytest.mark.parametrize(
    ("megatron", "reason"),
    [
        ({"fp32_residual_connection": True}, "fp32_residual_connection"),
        ({"fp8_param": True}, "weights are stored in FP8"),
    ],
)
def test_inputs_and_weights_have_one_dtype(megatron: dict[str, bool], reason: str) -> None:
    """The kernel has no conversions: what would need one is in no plan."""
    gemm = fused_plan(tiny_config(megatron=megatron), {Kernel.DECODE_GEMM}).decode.gemm
    assert not gemm
    assert reason in (gemm.reason or "")


@pytest.mark.parametrize(
    ("width", "outputs", "limit"),
    [
        (512, 3072, 5),
        (1024, 512, 5),
        (512, 8192, 5),
        (2048, 12288, 3),
        (2048, 512, 3),
        (4096, 2048, 0),
        (2048, 9216, 1),
        (2048, 151936, 1),
    ],
)
def test_the_measured_number_of_rows(width: int, outputs: int, limit: int) -> None:
    """The small model's projections and head, the released one's in_proj and router; then slower shapes."""
    assert max_rows(torch.zeros(1, 1).expand(outputs, width)) == limit
