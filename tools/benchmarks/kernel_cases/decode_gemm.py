"""Decoding's products of a few rows beside the library's: a group of tools/benchmarks/bench_kernels.py, where it is explained."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from triton.testing import do_bench_cudagraph

from megatron_q3n.kernels.decode import gemm as kernels

# place, widths of the inputs, rows of the first and of a second weight, what else: the small, then the released model
FEW_ROWS = (
    ("small in_proj", (512,), 3072, 16, ""),
    ("small linear_qkv", (512,), 2560, 0, ""),
    ("small out_proj", (1024,), 512, 0, "sum"),
    ("small eh_proj", (512, 512), 512, 0, ""),
    ("small head", (512,), 8192, 0, "keeps"),
    ("80b in_proj", (2048,), 12288, 64, ""),
    ("80b linear_qkv", (2048,), 9216, 0, ""),
    ("80b out_proj", (4096,), 2048, 0, "sum"),
    ("80b eh_proj", (2048, 2048), 2048, 0, ""),
    ("80b router", (2048,), 512, 0, "keeps wide"),
    ("80b head", (2048,), 151936, 0, "keeps"),
)


def few_rows(bench: Any) -> None:
    """Products of a few rows with their norms and sums: one launch of ours, the library's, and its product alone."""
    for place, widths, outputs, more, around in FEW_ROWS:
        for count in (1, 2, 3, 5, 8) if place.startswith("small") else (1, 3, 5):
            _few_rows_at(bench, place, count, widths, outputs, more, around)


def _few_rows_at(
    bench: Any, place: str, count: int, widths: tuple[int, ...], outputs: int, more: int, around: str
) -> None:
    inputs = [bench.random(count, width) for width in widths]
    norms = [kernels.RowNorm(0.1 * bench.random(width), 1e-6) for width in widths]
    normed = "sum" not in around
    first, *then = (kernels.Rows(x, norm if normed else None) for x, norm in zip(inputs, norms))
    weight, beside = bench.random(outputs, sum(widths)), bench.random(more, widths[0])
    total = bench.random(count, outputs)
    options: dict[str, Any] = {
        "then": then[0] if then else None,
        "beside_MK": beside if more else None,
        "sum_RN": None if normed else total,
        "keeps": "keeps" in around,
        "wide": "wide" in around,
    }

    def library() -> list[torch.Tensor]:
        """As many launches as today's modules make: the norm counts as one."""
        x = [F.rms_norm(x, x.shape[1:], n.weight_X, 1e-6) if normed else x for x, n in zip(inputs, norms)]
        given = torch.cat(x, -1) if then else x[0]
        if not normed:
            return [total.addmm_(given, weight.T)]
        if "wide" in around:
            return [torch.mm(given, weight.T, out_dtype=torch.float32)]
        return [F.linear(given, w) for w in ((weight, beside) if more else (weight,))]

    contestants = {
        "ours": lambda: kernels.few_rows(first, weight, **options, fused=True),
        "library": library,
        "its product alone": lambda: F.linear(torch.cat(inputs, -1) if then else inputs[0], weight),
    }
    gb = (weight.numel() + beside.numel()) * 2 / 1e9
    for whose, run in contestants.items():
        bench.time("rows", f"{place}, {count} rows: {whose}", run, gb, timer=replayed)


def replayed(run: Callable[[], Any], **_: object) -> float:
    """Return the milliseconds of one run in a CUDA graph of many: launches without the host."""
    with torch.no_grad():
        return do_bench_cudagraph(run, rep=10, return_mode="median")
