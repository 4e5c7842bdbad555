"""Products of a few rows, fused, against torch in fp64: every mix of norm, second input, second weight and sum.

Without a GPU the kernel runs in Triton's interpreter, in fp32. What the compiler makes of it:
tests/kernels/startup/test_hopper_compiler.py; the model's places: test_launches.py; bf16 on a GPU: the start-up check, test_gpu.py.
"""

import pytest
import torch
from torch import Tensor

from megatron_q3n.kernels.decode import gemm as kernels
from megatron_q3n.kernels.decode.gemm import Products, RowNorm, Rows, composed_few_rows, few_rows

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of single numbers too, from rounded rows
# rows, width, rows of the weight: pieces that do not come out even, widths of several pieces, one of everything
SIZES = [(1, 512, 40), (2, 40, 1), (3, 1030, 67), (5, 16, 300), (8, 96, 20), (16, 70, 9)]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])


def normal(seed: int, *shape: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def some_rows(seed: int, rows: int, width: int, normed: bool, **kind: object) -> Rows:
    """Return rows of a wider tensor, so that they do not lie one behind the other."""
    x = normal(seed, rows, width + 24, **kind)[:, 8 : 8 + width]  # type: ignore[arg-type]
    norm = RowNorm(0.2 * normal(seed + 1, width, **kind), 1e-3)  # type: ignore[arg-type]
    return Rows(x, norm if normed else None)


def exactly(rows: Rows | None) -> Rows | None:
    if rows is None:
        return None
    norm = rows.norm and RowNorm(rows.norm.weight_X.double(), rows.norm.eps, rows.norm.offset)
    return Rows(rows.x_RX.double(), norm)


def assert_near(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == exact.shape
    error = (ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


def both(rows: Rows, weight: Tensor, **options: Tensor | Rows | bool | None) -> list[Products]:
    """Multiply with the kernel, and by torch in fp64."""
    given = {"then": None, "beside_MK": None, "sum_RN": None, "keeps": False, "wide": False}
    given |= options  # type: ignore[arg-type]
    exact = {
        name: exactly(x) if isinstance(x, Rows) else x.double() if isinstance(x, Tensor) else x
        for name, x in given.items()
    }
    wide_rows = exactly(rows)
    assert wide_rows is not None
    wanted = composed_few_rows(wide_rows, weight.double(), **exact)  # type: ignore[arg-type]
    return [few_rows(rows, weight, **given, fused=True), wanted]  # type: ignore[arg-type]


@each_dtype
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("rows", "width", "outputs"), SIZES)
def test_a_product_and_a_sum(
    rows: int, width: int, outputs: int, normed: bool, dtype: torch.dtype, triton_device: str
) -> None:
    kind = {"device": triton_device, "dtype": dtype}
    given = some_rows(1, rows, width, normed, **kind)
    weight = normal(3, outputs, width, **kind)
    ours, wanted = both(given, weight)
    assert ours.out_RN.dtype == dtype
    assert_near(ours.out_RN, wanted.out_RN, dtype)
    residual = normal(4, rows, 2 * outputs, **kind)[:, :outputs]
    before = residual.clone()
    ours, wanted = both(given, weight, sum_RN=residual)
    assert_near(ours.out_RN, wanted.out_RN, dtype)
    assert torch.equal(residual, before)


@each_dtype
@pytest.mark.parametrize(("rows", "width", "outputs"), SIZES)
def test_two_weights_and_the_normed_rows(
    rows: int, width: int, outputs: int, dtype: torch.dtype, triton_device: str
) -> None:
    """The second weight has fewer rows than a piece, and as many as two and a bit."""
    kind = {"device": triton_device, "dtype": dtype}
    given = some_rows(1, rows, width, True, **kind)
    weight = normal(3, outputs, width, **kind)
    for more in (1, 18):
        ours, wanted = both(given, weight, beside_MK=normal(5, more, width, **kind), keeps=True)
        for name in ("out_RN", "beside_RM", "normed_RX"):
            assert_near(getattr(ours, name), getattr(wanted, name), dtype)
    ours, wanted = both(given, weight, keeps=True, wide=True)
    assert ours.out_RN.dtype == torch.float32
    assert_near(ours.out_RN, wanted.out_RN, dtype)


@each_dtype
@pytest.mark.parametrize("normed", [True, False])
def test_a_second_input_of_another_width(normed: bool, dtype: torch.dtype, triton_device: str) -> None:
    kind = {"device": triton_device, "dtype": dtype}
    for rows, first, second, outputs in ((1, 96, 96, 12), (4, 33, 600, 7), (9, 600, 5, 30)):
        given = some_rows(1, rows, first, normed, **kind)
        then = some_rows(6, rows, second, normed, **kind)
        weight = normal(3, outputs, first + second, **kind)
        ours, wanted = both(given, weight, then=then)
        assert_near(ours.out_RN, wanted.out_RN, dtype)


def test_zeros_stay_finite(triton_device: str) -> None:
    """A graph's padding rows are zeros."""
    kind = {"device": triton_device, "dtype": torch.float32}
    rows = Rows(torch.zeros(2, 64, **kind), RowNorm(torch.ones(64, **kind), 1e-6))  # type: ignore[arg-type]
    made = few_rows(rows, normal(1, 10, 64, **kind), keeps=True, fused=True)  # type: ignore[arg-type]
    assert made.normed_RX is not None
    assert made.out_RN.eq(0).all()
    assert made.normed_RX.eq(0).all()


def test_who_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not gradients, not many rows, not another format."""
    x, weight = torch.zeros(5, 1, 96), torch.nn.Parameter(torch.zeros(40, 96))
    with torch.no_grad():
        assert not kernels.serves(x, weight), "nothing is qualified"
        monkeypatch.setattr(kernels.choices, "is_fused", lambda operation, _: operation == kernels.OPERATION)
        assert kernels.serves(x, weight)
        assert not kernels.serves(x, weight, None)
        assert not kernels.serves(torch.zeros(6, 96), weight), "tensor cores' work"
        assert not kernels.serves(x.double(), weight)
    assert not kernels.serves(x, weight), "with gradients"


@pytest.mark.parametrize(
    ("width", "outputs", "most"),
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
def test_rows_up_to_which_it_was_measured_to_be_faster(width: int, outputs: int, most: int) -> None:
    """The small model's projections and head, the released one's in_proj and router; then what is slower."""
    weight = torch.zeros(1, 1).expand(outputs, width)
    assert [rows for rows in range(20) if kernels.fits(rows, weight)] == list(range(most + 1))
