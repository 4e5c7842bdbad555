"""Decode Gated DeltaNet step: a group of tools/benchmarks/bench_kernels.py, which explains it."""

from functools import partial
from typing import Any

import torch

from megatron_q3n.kernels.decode import gated_delta
from megatron_q3n.kernels.gated_delta.operands import DeltaHeads, DeltaWeights
from tools.benchmarks.kernel_cases.decode_gemm import time_replayed

# model, key and value heads, sequences, tokens of each
CASES = (
    ("small", 4, 8, 1, (1, 2, 3, 5)),
    ("small", 4, 8, 8, (1, 5)),
    ("80b", 16, 32, 1, (1, 3, 5)),
    ("80b", 16, 32, 8, (1,)),
)


def bench_decode_gated_delta(bench: Any) -> None:
    """Time a few tokens from a carried state; most of the bytes written are the states after each token."""
    for model, key_heads, value_heads, batch, token_counts in CASES:
        heads, f32 = DeltaHeads(key_heads, value_heads, 128, 128, 1e-6), torch.float32
        channels = sum(heads.sections[:3])
        weights = DeltaWeights(
            bench.random(channels, 4), *(bench.random(size, dtype=f32) for size in (value_heads, value_heads, 128))
        )
        conv = bench.random(batch, channels, 3)
        delta = bench.random(batch, value_heads, 128, 128, dtype=f32)
        for count in token_counts:
            x = bench.random(count, batch, sum(heads.sections))
            ba = bench.random(count, batch, 2 * value_heads)
            run = partial(gated_delta.decode_gated_delta, x, ba, weights, heads, conv, delta, fused=True)
            gb = delta.numel() * 4 * (1 + count) / 1e9
            case_name = f"{model}, {batch} × {count} tokens"
            bench.time("decode_gated_delta", case_name, run, gb, timer=time_replayed)
