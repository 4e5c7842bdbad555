"""Decode GEMM against the library's kernels: a group of tools/benchmarks/bench_kernels.py, which explains it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from triton.testing import do_bench_cudagraph

from megatron_q3n.kernels.decode import gemm
from megatron_q3n.kernels.decode.operands import GemmInput, RMSNormWeights

# layer, widths of the inputs, output widths of the first and of a second weight, options: the small, then the released
# model
CASES = (
    ("small in_proj", (512,), 3072, 16, ""),
    ("small linear_qkv", (512,), 2560, 0, ""),
    ("small out_proj", (1024,), 512, 0, "residual"),
    ("small eh_proj", (512, 512), 512, 0, ""),
    ("small head", (512,), 8192, 0, "returns_normed"),
    ("80b in_proj", (2048,), 12288, 64, ""),
    ("80b linear_qkv", (2048,), 9216, 0, ""),
    ("80b out_proj", (4096,), 2048, 0, "residual"),
    ("80b eh_proj", (2048, 2048), 2048, 0, ""),
    ("80b router", (2048,), 512, 0, "returns_normed fp32"),
    ("80b head", (2048,), 151936, 0, "returns_normed"),
)


def bench_decode_gemm(bench: Any) -> None:
    """Time decode GEMMs with norms and residuals: one fused launch, the library's kernels, and its GEMM alone."""
    for layer, widths, outputs, second_width, options_text in CASES:
        for rows in (1, 2, 3, 5, 8) if layer.startswith("small") else (1, 3, 5):
            _bench_case(bench, layer, rows, widths, outputs, second_width, options_text)


def _bench_case(
    bench: Any, layer: str, rows: int, widths: tuple[int, ...], outputs: int, second_width: int, options_text: str
) -> None:
    inputs = [bench.random(rows, width) for width in widths]
    norms = [RMSNormWeights(0.1 * bench.random(width), 1e-6) for width in widths]
    normed = "residual" not in options_text
    first, *second = (GemmInput(x, norm if normed else None) for x, norm in zip(inputs, norms))
    weight, second_weight = bench.random(outputs, sum(widths)), bench.random(second_width, widths[0])
    residual = bench.random(rows, outputs)
    options: dict[str, Any] = {
        "second": second[0] if second else None,
        "second_weight_MK": second_weight if second_width else None,
        "residual_RN": None if normed else residual,
        "returns_normed": "returns_normed" in options_text,
        "fp32_output": "fp32" in options_text,
    }

    def library() -> list[torch.Tensor]:
        """Run the launches of the unfused modules; a norm counts as one."""
        x = [F.rms_norm(x, x.shape[1:], n.weight_X, 1e-6) if normed else x for x, n in zip(inputs, norms)]
        operand = torch.cat(x, -1) if second else x[0]
        if not normed:
            return [residual.addmm_(operand, weight.T)]
        if "fp32" in options_text:
            return [torch.mm(operand, weight.T, out_dtype=torch.float32)]
        return [F.linear(operand, w) for w in ((weight, second_weight) if second_width else (weight,))]

    variants = {
        "ours": lambda: gemm.decode_gemm(first, weight, **options, fused=True),
        "library": library,
        "its GEMM alone": lambda: F.linear(torch.cat(inputs, -1) if second else inputs[0], weight),
    }
    gb = (weight.numel() + second_weight.numel()) * 2 / 1e9
    for name, run in variants.items():
        bench.time("decode_gemm", f"{layer}, {rows} rows: {name}", run, gb, timer=time_replayed)


def time_replayed(run: Callable[[], Any], **_: object) -> float:
    """Return the milliseconds of one run in a CUDA graph of many, without host overhead."""
    with torch.no_grad():
        return do_bench_cudagraph(run, rep=10, return_mode="median")
