#!/usr/bin/env python3
"""Benchmark of each fused kernel against its torch reference and the libraries' kernels, on one GPU.

    tools/benchmarks/bench_kernels.py [--tokens 16384] [--sequence 4096] [--experts 128] [--only moe,…] [--json FILE]

Shapes are Qwen3-Next's: hidden 2048, 16/32 heads of 128, experts 512 wide, 10 of them per token. A row is the median
of repeated runs; GB/s counts each input read and each output written once, TFLOP/s multiply-adds as two. Compare
within one run only.

`decode_gemm` is the decode GEMM at the small and the released model's sizes, replayed as CUDA graphs with the weights
in the L2 cache as the last replay left them, as in a decode step. Where ours is slower than the library for the rows
that matter, add (K, N) to `MAX_ROWS_BY_SHAPE` in kernels/decode/gemm.py, or try other `BLOCK_SIZES` in
kernels/decode/gemm_triton.py. `decode_gated_delta` is the decode Gated DeltaNet step, measured in the same way.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from triton.testing import do_bench

from tools.benchmarks.kernel_cases.decode_gated_delta import bench_decode_gated_delta
from tools.benchmarks.kernel_cases.decode_gemm import bench_decode_gemm
from tools.benchmarks.kernel_cases.layer_heads import bench_layer_prologues

HIDDEN, WIDTH, TOPK, KEY_HEADS, VALUE_HEADS, DIM = 2048, 512, 10, 16, 32, 128
Row = tuple[str, str, float, float, float]  # group, what, ms, GB, GFLOP


class Bench:
    """Random inputs of one size, and the rows measured on them."""

    def __init__(self, tokens: int, sequence: int, experts: int) -> None:
        self.tokens, self.sequence, self.batch = tokens, sequence, tokens // sequence
        self.experts = experts
        self.rows: list[Row] = []
        self.generator = torch.Generator("cuda").manual_seed(0)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device="cuda").to(dtype)

    def time(
        self,
        group: str,
        what: str,
        run: Callable[[], Any],
        gb: float = 0.0,
        gflop: float = 0.0,
        timer: Callable[..., float] = do_bench,
    ) -> None:
        """Time `run`; a library that is not installed or rejects the input is reported as such."""
        try:
            ms = timer(run, warmup=15, rep=40, return_mode="median")
        except (RuntimeError, ImportError, ValueError, AssertionError, TypeError) as problem:
            print(f"{group:9} {what:44} not run: {type(problem).__name__}: {str(problem)[:90]}")
            return
        self.rows.append((group, what, ms, gb, gflop))
        rates = (f"{gb / ms * 1e3:8.0f} GB/s" if gb else " " * 13) + (f"{gflop / ms:8.0f} TFLOP/s" if gflop else "")
        shown = f"{ms:8.3f} ms" if ms > 0.1 else f"{1e3 * ms:8.2f} µs"
        print(f"{group:9} {what:44} {shown} {rates}", flush=True)

    def forward_backward(
        self,
        group: str,
        what: str,
        run: Callable[..., Any],
        inputs: list[torch.Tensor],
        gb: float = 0.0,
        gflop: float = 0.0,
    ) -> None:
        """Time a differentiable function forward, and forward + backward."""
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        differentiable = [x for x in leaves if x.requires_grad]
        try:
            out = run(*leaves)
        except (RuntimeError, ImportError, ValueError, AssertionError, TypeError) as problem:
            print(f"{group:9} {what:44} not run: {type(problem).__name__}: {str(problem)[:90]}")
            return
        gradient = torch.randn_like(out)

        def both() -> Any:
            return torch.autograd.grad(run(*leaves), differentiable, gradient, allow_unused=True)

        with torch.no_grad():
            self.time(group, f"{what}, forward", lambda: run(*inputs), gb, gflop)
        self.time(group, f"{what}, forward+backward", both, 3 * gb, 3 * gflop)


def dense(bench: Bench) -> None:
    """Time large GEMMs: the practical upper bound."""
    for name, n, k in (("8192³", 8192, 8192), ("in_proj", 12288, 2048), ("out_proj", 2048, 4096)):
        m = 8192 if n == k else bench.tokens
        x, w = bench.random(m, k), bench.random(n, k)
        dy = bench.random(m, n)
        gflop = 2e-9 * m * n * k
        bench.time("dense", f"{name} forward", lambda x=x, w=w: x @ w.T, gflop=gflop)
        bench.time("dense", f"{name} input gradient", lambda dy=dy, w=w: dy @ w, gflop=gflop)
        bench.time("dense", f"{name} weight gradient", lambda dy=dy, x=x: dy.T @ x, gflop=gflop)
    x = bench.random(1 << 28)
    bench.time("dense", "device copy", lambda: x.clone(), 2 * x.numel() * 2 / 1e9)


def gdn(bench: Bench) -> None:
    """Time the delta rule, its prologue and its epilogue."""
    from megatron_q3n.kernels.gated_delta import gated_norm_triton as fused_norm
    from megatron_q3n.kernels.gated_delta import gates_triton
    from megatron_q3n.kernels.gated_delta import mixer_inputs_triton as fused
    from megatron_q3n.kernels.gated_delta.causal_conv import causal_conv
    from megatron_q3n.kernels.gated_delta.operands import DeltaShape
    from megatron_q3n.kernels.norms import gated_rms_norm, l2_norm

    shape = DeltaShape(KEY_HEADS, VALUE_HEADS, DIM)
    value = VALUE_HEADS * DIM
    x = bench.random(bench.sequence, bench.batch, shape.channels + value)
    conv_weight = bench.random(shape.channels, 4)
    gb = bench.tokens * shape.channels * 2 / 1e9
    ours = lambda: fused.delta_inputs(x, conv_weight, None, shape)
    bench.time("gdn", "inputs: ours forward", ours, 2 * gb)
    q, k, v = ours()
    dx = torch.empty_like(x)
    bench.time(
        "gdn",
        "inputs: ours backward",
        lambda: fused.delta_inputs_backward(x, conv_weight, None, shape, q, k, v, dx),
        3 * gb,
    )

    def composed(x: torch.Tensor, conv_weight: torch.Tensor) -> torch.Tensor:
        mixed = causal_conv(x.transpose(0, 1)[..., : shape.channels], conv_weight)
        parts = mixed.split([KEY_HEADS * DIM, KEY_HEADS * DIM, value], -1)
        q, k = (l2_norm(y.unflatten(-1, (-1, DIM))).flatten(-2) for y in parts[:2])
        return torch.cat([q, k, parts[2]], -1)

    bench.forward_backward("gdn", "inputs: torch", composed, [x, conv_weight], 2 * gb)

    def library(x: torch.Tensor, conv_weight: torch.Tensor) -> torch.Tensor:
        from fla.modules.convolution import causal_conv1d
        from fla.modules.l2norm import l2_norm as fla_l2_norm

        mixed = causal_conv1d(x.transpose(0, 1)[..., : shape.channels].contiguous(), conv_weight, activation="silu")[0]
        parts = mixed.split([KEY_HEADS * DIM, KEY_HEADS * DIM, value], -1)
        q, k = (fla_l2_norm(y.unflatten(-1, (-1, DIM)).contiguous()) for y in parts[:2])
        return torch.cat([q.flatten(-2), k.flatten(-2), parts[2]], -1)

    bench.forward_backward("gdn", "inputs: fla", library, [x, conv_weight], 2 * gb)
    o, weight = (bench.random(bench.batch, bench.sequence, VALUE_HEADS, DIM), torch.zeros(DIM, device="cuda"))
    gb = bench.tokens * value * 2 / 1e9
    bench.time("gdn", "gated norm: ours forward", lambda: fused_norm.gated_norm(o, x, weight, 1e-6), 3 * gb)
    y = bench.random(bench.sequence, bench.batch, value)
    bench.time(
        "gdn", "gated norm: ours backward", lambda: fused_norm.gated_norm_backward(o, x, weight, 1e-6, y, dx), 5 * gb
    )

    def composed_norm(o: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        z = x.transpose(0, 1)[..., shape.channels :].unflatten(-1, (-1, DIM))
        return gated_rms_norm(o, z, weight, 1e-6).flatten(2).transpose(0, 1).contiguous()

    bench.forward_backward("gdn", "gated norm: torch", composed_norm, [o, x, weight], 3 * gb)
    ba = bench.random(bench.sequence, bench.batch, 2 * VALUE_HEADS)
    heads = torch.ones(VALUE_HEADS, device="cuda")
    gates = lambda: gates_triton.delta_gates(ba, heads, heads, torch.bfloat16)
    bench.time("gdn", "gates: ours forward", gates)
    g, beta = gates()
    bench.time("gdn", "gates: ours backward", lambda: gates_triton.delta_gates_backward(ba, heads, heads, g, beta))
    delta_rule(bench, q, k, v, g, beta)


def delta_rule(bench: Bench, q: Any, k: Any, v: Any, g: Any, beta: Any) -> None:
    """Time FLA's rule, which dispatches to FlashQLA where it can, for two layouts of the same tokens."""

    def rule(q: Any, k: Any, v: Any, g: Any, beta: Any) -> torch.Tensor:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0]

    inputs = [q, k, v, g, beta]
    bench.forward_backward("gdn", f"delta rule {bench.batch}×{bench.sequence}", rule, inputs)
    whole = [x.reshape(1, bench.tokens, *x.shape[2:]) for x in inputs]
    bench.forward_backward("gdn", f"delta rule 1×{bench.tokens}", rule, whole)


def moe(bench: Bench) -> None:
    """Time routing, permutation, and grouped GEMMs."""
    from megatron_q3n.kernels.moe import permutation_triton

    tokens, experts, rows = bench.tokens, bench.experts, bench.tokens * TOPK
    logits = bench.random(tokens, experts, dtype=torch.float32)
    top = logits.topk(TOPK, 1)
    routing = torch.zeros(tokens, experts, dtype=torch.bool, device="cuda").scatter_(1, top.indices, True)
    probs = torch.zeros_like(logits).scatter_(1, top.indices, top.values.softmax(-1))
    x = bench.random(tokens, HIDDEN)
    bench.time("moe", "plan: ours", lambda: permutation_triton.plan(routing, probs, TOPK))
    row, expert, _, gates, counts = permutation_triton.plan(routing, probs, TOPK)
    small, large = tokens * HIDDEN * 2 / 1e9, rows * HIDDEN * 2 / 1e9
    bench.time("moe", "permute: ours", lambda: permutation_triton.scatter_rows(x, row), small + large)
    permuted = permutation_triton.scatter_rows(x, row)
    bench.time("moe", "unpermute: ours", lambda: permutation_triton.gather_rows(permuted, row), small + large)
    summed = lambda: permutation_triton.gather_rows(permuted, row, x)
    bench.time("moe", "unpermute and sum: ours", summed, 2 * small + large)
    bench.time("moe", "gate gradient: ours", lambda: permutation_triton.gate_gradient(gates, row, expert, experts))

    def te_permute(x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        from transformer_engine.pytorch.permutation import moe_permute_with_probs

        return moe_permute_with_probs(x, probs, routing, num_out_tokens=rows)[0]

    bench.forward_backward("moe", "permute: TransformerEngine", te_permute, [x, probs], small + large)

    def router(logits: torch.Tensor) -> torch.Tensor:
        from transformer_engine.pytorch.router import fused_topk_with_score_function

        return fused_topk_with_score_function(logits, TOPK, False, None, None, None, "softmax", None)[0]

    bench.forward_backward("moe", "top-k: TransformerEngine", router, [logits])
    bench.time("moe", "top-k: torch", lambda: logits.topk(TOPK, 1))
    bench_grouped_gemms(bench, counts, gates)


def bench_grouped_gemms(bench: Bench, counts: torch.Tensor, gates: torch.Tensor) -> None:
    """Time the experts' grouped GEMMs and SwiGLU, on permuted rows."""
    from megatron_q3n.kernels.moe.grouped_gemm_triton import grouped_gemm, row_blocks
    from megatron_q3n.kernels.moe.grouped_wgrad_triton import grouped_weight_gradient
    from megatron_q3n.kernels.moe.swiglu import swiglu

    rows, experts = bench.tokens * TOPK, bench.experts
    ends, blocks = counts.cumsum(0).to(torch.int32), row_blocks(counts, rows)
    bench.time("moe", "row block list", lambda: row_blocks(counts, rows))
    for name, n, k in (("fc1", 2 * WIDTH, HIDDEN), ("fc2", HIDDEN, WIDTH)):
        x, w, dy = bench.random(rows, k), bench.random(experts, n, k), bench.random(rows, n)
        main = torch.zeros(experts, n, k, device="cuda")
        products: dict[str, Callable[[], Any]] = {
            "forward: torch": lambda x=x, w=w: torch._grouped_mm(x, w.transpose(1, 2), offs=ends),
            "forward: ours": lambda x=x, w=w: grouped_gemm(x, w, blocks),
            "input gradient: ours": lambda dy=dy, w=w: grouped_gemm(dy, w, blocks, transposed=True),
            "weight gradient: ours, written": lambda dy=dy, x=x, main=main: grouped_weight_gradient(
                dy, x, ends, main, False
            ),
            "input gradient: torch": lambda dy=dy, w=w: torch._grouped_mm(dy, w, offs=ends),
            "weight gradient: torch": lambda dy=dy, x=x: torch._grouped_mm(dy.T, x, offs=ends),
            "weight gradient: torch, added in fp32": lambda dy=dy, x=x, main=main: main.add_(
                torch._grouped_mm(dy.T, x, offs=ends)
            ),
            "weight gradient: ours, added in fp32": lambda dy=dy, x=x, main=main: grouped_weight_gradient(
                dy, x, ends, main, True
            ),
        }
        for what, run in products.items():
            bench.time("moe", f"{name} {what}", run, gflop=2e-9 * rows * n * k)
    gate_up, gb = bench.random(rows, 2 * WIDTH), rows * WIDTH * 2 / 1e9
    for fused, name in ((True, "ours"), (False, "torch")):

        def activate(x: torch.Tensor, gates: torch.Tensor, fused: bool = fused) -> torch.Tensor:
            return swiglu(x, gates, fused=fused)

        bench.forward_backward("moe", f"swiglu: {name}", activate, [gate_up, gates], 3 * gb)


def attention(bench: Bench) -> None:
    """Time causal attention of 16 query and 2 key heads of 256."""
    q = bench.random(bench.batch, 16, bench.sequence, 256)
    k, v = (bench.random(bench.batch, 2, bench.sequence, 256) for _ in "kv")
    gflop = 2e-9 * bench.tokens * bench.sequence * 16 * 256 * 2 / 2
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        kind = getattr(torch.nn.attention.SDPBackend, backend)

        def attend(q: Any, k: Any, v: Any, kind: Any = kind) -> torch.Tensor:
            with torch.nn.attention.sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        bench.forward_backward("attention", f"torch {backend.lower()}", attend, [q, k, v], gflop=gflop)

    def te(q: Any, k: Any, v: Any) -> torch.Tensor:
        return core(q, k, v)

    try:
        from transformer_engine.pytorch import DotProductAttention

        core = DotProductAttention(
            16, 256, num_gqa_groups=2, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal"
        )
    except ImportError:
        return
    by_sequence = [x.permute(2, 0, 1, 3).contiguous() for x in (q, k, v)]
    bench.forward_backward("attention", "TransformerEngine", te, by_sequence, gflop=gflop)


GROUPS = {
    "dense": dense,
    "gdn": gdn,
    "moe": moe,
    "attention": attention,
    "prologues": bench_layer_prologues,
    "decode_gemm": bench_decode_gemm,
    "decode_gated_delta": bench_decode_gated_delta,
}


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--only", default=",".join(GROUPS), help=f"of {','.join(GROUPS)}")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    unknown = [name for name in options.only.split(",") if name not in GROUPS]
    if unknown:
        print(f"error: --only {unknown[0]}: allowed are {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: tools/benchmarks/bench_kernels.py needs a GPU; torch sees none", file=sys.stderr)
        return 2
    bench = Bench(options.tokens, options.sequence, options.experts)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options}")
    for name in options.only.split(","):
        GROUPS[name](bench)
        torch.cuda.empty_cache()
    if options.json:
        names = ("group", "what", "ms", "gigabytes", "gigaflop")
        options.json.write_text(json.dumps([dict(zip(names, row)) for row in bench.rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
