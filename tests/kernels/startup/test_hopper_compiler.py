"""Kernels compile for Hopper, without a GPU: the interpreter of the other tests knows nothing of the compiler.

The grouped product must keep its two loops joined, which Triton's pass easily gives up; the kernels of a few tokens
must fit into registers and shared memory at the sizes of every recipe. Speed is not covered
(tools/benchmarks/bench_kernels.py, tools/benchmarks/bench_generate.py).
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton ships with torch for Linux only")

VARIANTS = [(turned, columns, False) for turned in (False, True) for columns in (256, 128)]
# head dim, query heads of a group, new tokens, window: one token and drafts of the small and the released model,
# more rows than a program has, and a sliding window
QUERIES = [(128, 4, 1, None), (256, 8, 1, None), (256, 8, 16, None), (64, 8, 3, 100)]
STEPS = [(4, 8, 128), (16, 32, 128), (2, 4, 64)]  # key and value heads, and their size
# experts, chosen, with the product, with the norm: the small and the released model
ROUTES = [(64, 4, True, False), (64, 4, True, True), (512, 10, False, False)]
# input rows, widths of the inputs, rows of the weight, what stands around: of the small model the projections into and
# out of a mixer, the draft layer's and the head; of the released one those, and the router
ROWS = [
    (1, 512, 0, 3072, "norm beside"),
    (5, 512, 0, 3072, "norm beside"),
    (16, 512, 0, 2560, "norm"),
    (1, 1024, 0, 512, "sum"),
    (8, 1024, 0, 512, "sum"),
    (5, 512, 512, 512, "norm"),
    (5, 512, 0, 8192, "norm keeps"),
    (6, 2048, 0, 12288, "norm beside"),
    (6, 4096, 0, 2048, "sum"),
    (6, 2048, 2048, 2048, "norm"),
    (1, 2048, 0, 151936, "norm keeps"),
    (6, 2048, 0, 151936, "norm keeps"),
    (16, 2048, 0, 512, "norm keeps wide"),
]
HERE = Path(__file__)
HOPPERS_SHARED_BYTES = 227 * 1024


def run_in_a_compiling_process(function: str) -> list[str]:
    """Return what a function of this file prints: the interpreter is chosen when Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({str(HERE)!r})[{function!r}]()"]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_every_grouped_product_multiplies_on_tensor_cores() -> None:
    found = run_in_a_compiling_process("compile_grouped_products")
    assert found == ["wgmma"] * (len(VARIANTS) + 1)


def test_fp8_weight_gradients_multiply_on_tensor_cores() -> None:
    """Without a spilled register, and with loads that begin before a tile is written."""
    found = run_in_a_compiling_process("compile_fp8_weight_gradients")
    assert found == ["fits", "wgmma", "ahead"] * 2 + ["fits"] * 2


def test_kernels_of_a_few_tokens_fit() -> None:
    """No spilled register and no more shared memory than there is."""
    found = run_in_a_compiling_process("compile_few_tokens")
    assert found == ["fits"] * (2 * len(QUERIES) + len(ROUTES) + len(STEPS) + 4)


def test_products_of_a_few_rows_fit_and_read_their_weights_in_large_pieces() -> None:
    """16 bytes a load, which a branch would hide from the compiler; a barrier before each row is stored, no more."""
    found = run_in_a_compiling_process("compile_few_rows")
    assert found == ["fits"] * len(ROWS)


def test_kernels_around_mixers_fit_and_load_ahead() -> None:
    """The released model's convolution, norm and attention inputs; a walk's loads must run ahead of it."""
    found = run_in_a_compiling_process("compile_around_mixers")
    assert found == ["ahead", "fits"] * 2 + ["fits"] * 4


def compile_around_mixers() -> None:
    """Compile, and say for each kernel whether it fits."""
    from megatron_q3n.kernels import residual_norm_triton
    from megatron_q3n.kernels.attention import qkv_norm_rope_triton
    from megatron_q3n.kernels.gated_delta import mixer_inputs_triton

    types = {"dweight_ptr": "*fp32", "eps": "fp32", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    strides = ("stride_t", "stride_b", "x_stride_t", "x_stride_b", "dx_stride_t", "dx_stride_b")
    heads = {"KEY_HEADS": 16, "VALUE_HEADS": 32, "DIM": 128, "HEADS": mixer_inputs_triton._HEADS}
    for kernel, launch in (
        (mixer_inputs_triton._delta_inputs_kernel, mixer_inputs_triton._FORWARD),
        (mixer_inputs_triton._delta_inputs_backward_kernel, mixer_inputs_triton._BACKWARD),
    ):
        constants = {**heads, **launch, "PACKED": False, "position_ptr": None}
        made = _compiled(kernel, constants, types, strides, {"num_warps": mixer_inputs_triton._WARPS})
        print("ahead" if "cp.async.cg" in made.asm["ptx"] else "waits")
        _say_fits(made)
    row = {"WIDTH": 2048, "BLOCK_H": 2048}
    options = {"num_warps": residual_norm_triton._FORWARD_WARPS}
    _say_fits(_compiled(residual_norm_triton._residual_norm_kernel, row, types, (), options))
    launch = dict(residual_norm_triton._BACKWARD)
    options = {"num_warps": launch.pop("num_warps")}
    given = {**row, **launch, "READERS": 4, "STREAM": True}
    backward = residual_norm_triton._residual_norm_backward_kernel
    _say_fits(_compiled(backward, given, types, ("tokens",), options))
    group = {"GROUPS": 2, "QUERIES": 8, "GATED": True, "DIM": 256, "TURNED": 64}
    for kernel, launch in (
        (qkv_norm_rope_triton._attention_inputs_kernel, dict(qkv_norm_rope_triton._FORWARD)),
        (qkv_norm_rope_triton._attention_inputs_backward_kernel, dict(qkv_norm_rope_triton._BACKWARD)),
    ):
        options = {"num_warps": launch.pop("num_warps")}
        _say_fits(_compiled(kernel, {**group, **launch}, types, ("rows",), options))


def compile_grouped_products() -> None:
    """Compile, and say for each whether it multiplies on the tensor cores."""
    for turned, columns, scaled in [*VARIANTS, (False, 256, True)]:
        ptx = _grouped_product(turned, columns, scaled).asm["ptx"]
        print("wgmma" if "wgmma.mma_async" in ptx else "slow")


def compile_fp8_weight_gradients() -> None:
    """Compile, writing and adding; and what turns their operands, gathering and not."""
    from megatron_q3n.kernels.moe import fp8_wgrad_triton as module

    outputs, inputs, warps, stages = module._TILE
    types = {
        "dy_desc": f"tensordesc<fp8e4nv[{outputs}, 128]>",
        "x_desc": f"tensordesc<fp8e4nv[{inputs}, 128]>",
        **dict.fromkeys(("out_ptr", "dy_scale_ptr", "x_scale_ptr"), "*fp32"),
        "first_ptr": "*i32",
    }
    for accumulate in (False, True):
        constants = {
            "ACCUMULATE": accumulate,
            "BLOCK_N": outputs,
            "BLOCK_K": inputs,
            "PROGRAMS": 132,
            "TILES_EACH": 64,
            "AT_ONCE": module._BLOCKS_AT_ONCE,
        }
        options = {"num_warps": warps, "num_stages": stages}
        kernel = _compiled(module._gradient_kernel, constants, types, ("N", "K"), options)
        _say_fits(kernel)
        print("wgmma" if "wgmma.mma_async" in kernel.asm["ptx"] else "slow")
        loop = kernel.asm["ttgir"].partition("scf.for")[2]
        print("ahead" if 0 < loop.find("async_tma_copy") < loop.find("tt.store") else "waits")
    types = {"x_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "out_scale_ptr": "*fp32"}
    lists = ("source_ptr", "out_ptr", "ends_ptr", "expert_ptr", "row_ptr", "count_ptr")
    types |= dict.fromkeys(lists, "*i32")
    sizes = {"ROWS": 128, "COLUMNS": module._TURNED_COLUMNS, "AT_ONCE": module._SCALES_AT_ONCE}
    for gathers in ({}, {"source_ptr": None}):
        options = {"num_warps": module._TURNED_WARPS}
        _say_fits(_compiled(module._turn_kernel, {**sizes, **gathers}, types, ("WIDTH",), options))


def compile_few_tokens() -> None:
    """Compile, and say for each kernel whether it fits."""
    _compile_few_queries()
    _compile_few_routes()
    _compile_few_tokens()
    _compile_delta_steps()


def compile_few_rows() -> None:
    """Compile, and say for each whether it fits; how it loads and waits is in its PTX."""
    from megatron_q3n.kernels.decode import gemm_triton as module

    types = {"eps": "fp32"}
    for rows, width, more, outputs, around in ROWS:
        constants: dict[str, Any] = {
            "R": rows,
            "X": width,
            "Y": more,
            "HAS_NORM": "norm" in around,
            "OFFSET": 1.0,
            "ALIGNED": True,
            "HAS_BESIDE": "beside" in around,
            "HAS_SUM": "sum" in around,
            "KEEPS": "keeps" in around,
            **module.block_sizes(rows, outputs, width),
        }
        wanted = {
            "norm_ptr": "norm",
            "beside_ptr": "beside",
            "beside_out_ptr": "beside",
            "sum_ptr": "sum",
            "normed_ptr": "keeps",
        }
        constants |= {name: None for name, what in wanted.items() if what not in around}
        if not more:
            constants |= {"y_ptr": None, "y_norm_ptr": None}
        made = {"out_ptr": "*fp32"} if "wide" in around else {}
        aligned, options = (("N", "M", "x_stride", "y_stride", "sum_stride"), {"num_warps": module.WARPS})
        kernel = _compiled(module._few_rows_kernel, constants, {**types, **made}, aligned, options)
        ptx = kernel.asm["ptx"]
        piece = constants["BLOCK_N"] * constants["BLOCK_K"] // 256  # loads of 16 bytes by 32 lanes
        assert ptx.count("ld.global.v4.b32") >= piece, (rows, width, outputs, around)
        assert ptx.count("bar.sync") <= rows + 1, (rows, width, outputs, around)
        _say_fits(kernel)


def _compile_few_tokens() -> None:
    from megatron_q3n.kernels.decode import argmax_triton as module

    types = dict.fromkeys(("top_ptr", "total_ptr", "best_ptr"), "*fp32")
    types |= dict.fromkeys(("drafts_ptr", "chosen_ptr", "grown_ptr", "row_ptr"), "*i64")
    types |= {"token_ptr": "*i32", "packed_ptr": "*fp64"}
    options = {"num_warps": module.WARPS_OF_PIECES}
    _say_fits(_compiled(module._pieces_kernel, {"PIECE": module.PIECE}, types, ("V",), options))
    block, types = {"BLOCK": 2**14}, {**types, "out_ptr": "*i64"}
    _say_fits(_compiled(module._likeliest_kernel, block, types, ("logits_stride",), options))
    # no draft and the small model's vocabulary, four drafts and the released one's
    for sizes in ({"T": 1, "TP": 1, "PP": 2}, {"T": 5, "TP": 8, "PP": 64}):
        _say_fits(_compiled(module._judge_kernel, sizes, types, ("V",), {"num_warps": 4}))


def _compile_delta_steps() -> None:
    """No vector is made again by every thread that reads it, and no warp waits for another inside the rule."""
    from megatron_q3n.kernels.decode import gated_delta_triton as module

    fp32 = dict.fromkeys(("a_log_ptr", "dt_bias_ptr", "norm_ptr", "delta_ptr"), "*fp32")
    types = {**fp32, "delta_out_ptr": "*fp32", "scale": "fp32", "eps": "fp32"}
    strides, taps = ("stride_t", "stride_b", "ba_stride_t", "ba_stride_b"), 4
    for keys, values, dim in STEPS:
        sizes = {"KEY_HEADS": keys, "VALUE_HEADS": values, "DIM": dim, "TAPS": taps}
        constants: dict[str, Any] = {**sizes, **module.block_sizes(dim, values)}
        options = {"num_warps": constants["WARPS"]}
        kernel = _compiled(module._kernel, constants, types, strides, options)
        ptx = kernel.asm["ptx"]
        assert ptx.count("ld.global.v4.b32") == dim * dim // 128 // constants["WARPS"]
        assert ptx.count("ld.global") < ptx.count("ld.global.v4.b32") + 40 * dim // 32
        assert ptx.count("bar.sync") <= 16
        _say_fits(kernel)


def _compile_few_routes() -> None:
    from megatron_q3n.kernels.decode import router_triton as module
    from megatron_q3n.kernels.decode.gemm import RowNorm
    from megatron_q3n.kernels.decode.router import Choice

    fp32 = dict.fromkeys(("logits_ptr", "bias_ptr", "gates_ptr"), "*fp32")
    types = {**fp32, "experts_ptr": "*i64", "scaling": "fp32", "eps": "fp32"}
    for experts, topk, product, normed in ROUTES:
        norm = RowNorm(torch.zeros(1), 1e-6) if normed else None
        constants: dict[str, Any] = {
            **module.constants(experts, Choice(topk), 512 if product else 0, norm),
            "bias_ptr": None,
        }
        constants |= {"logits_ptr": None} if product else {"x_ptr": None, "weight_ptr": None}
        if not normed:
            constants |= {"norm_ptr": None, "normed_ptr": None}
        warps = module.WARPS_OF_PRODUCT if product else module.WARPS
        _say_fits(_compiled(module._few_routes_kernel, constants, types, (), {"num_warps": warps}))


def _compile_few_queries() -> None:
    from megatron_q3n.kernels.decode import attention_triton as module
    from megatron_q3n.kernels.decode.attention import AttentionHeads

    types = {"start_ptr": "*i64", "scale": "fp32", "eps": "fp32"}
    types |= dict.fromkeys(("core_ptr", "top_ptr", "total_ptr"), "*fp32")
    for dim, queries, tokens, window in QUERIES:
        heads = AttentionHeads(2, queries, dim, True, dim**-0.5, window)
        sizes = module.block_sizes(tokens, heads)
        shared = {"G": 2, "R": queries, "D": dim, "GATED": True, "WINDOWED": window is not None}
        shared["BLOCK"] = sizes["BLOCK"]
        read = {**shared, "HALF": dim // 8, "HAS_NORM": True, "OFFSET": 1.0, "ROWS": sizes["ROWS"]}
        join = {**shared, "PIECES": module.PIECES, "CHANNELS": min(module.CHANNELS, dim)}
        strides = ("stride_t", "stride_n", "cache_stride_n", "cache_stride_g")
        _say_fits(_compiled(module._read_kernel, read, types, strides, module.LAUNCH))
        _say_fits(_compiled(module._join_kernel, join, types, strides, {"num_warps": 4}))


def _say_fits(kernel: Any) -> None:
    usage = _resource_usage(kernel.asm["cubin"])
    fits = usage["STACK"] == usage["LOCAL"] == 0 and kernel.metadata.shared < HOPPERS_SHARED_BYTES
    print("fits" if fits else f"{kernel.metadata.name}:{usage}".replace(" ", ""))


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Return what a kernel takes: REG registers of a thread, STACK and LOCAL bytes where they did not suffice, …"""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", told)}


def _grouped_product(turned: bool, columns: int, scaled: bool) -> Any:
    from megatron_q3n.kernels.moe import grouped_gemm_triton as module

    wide = columns == 256
    element, size = ("fp8e4nv", 1) if scaled else ("bf16", 2)
    block_k = 128 // size
    tile = (block_k, columns) if turned else (columns, block_k)
    constants = {
        "TURNED": turned,
        "SCALED": scaled,
        "ROWS": module.BLOCK_R,
        "COLUMNS": columns,
        "BLOCK_K": block_k,
        "HALVES": wide,
        "PROGRAMS": 132,
    }
    if not scaled:
        constants |= {"row_scale_ptr": None, "weight_scale_ptr": None}
    types = {
        "rows_desc": f"tensordesc<{element}[{module.BLOCK_R}, {block_k}]>",
        "weight_desc": f"tensordesc<{element}[{tile[0]}, {tile[1]}]>",
        "out_desc": f"tensordesc<bf16[{module.BLOCK_R}, {columns // 2 if wide else columns}]>",
        "out_ptr": "*bf16",
        "row_scale_ptr": "*fp32",
        "weight_scale_ptr": "*fp32",
        **dict.fromkeys(("ends_ptr", "expert_ptr", "row_ptr", "count_ptr"), "*i32"),
    }
    warps, stages = (module._WIDE if wide else module._NARROW)[1:]
    options = {"num_warps": warps, "num_stages": stages}
    return _compiled(module._product_kernel, constants, types, ("N", "K"), options)


def _compiled(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], aligned: tuple[str, ...], options: dict[str, int]
) -> Any:
    """Compile for compute capability 9.0; pointers are to bf16, the rest i32, unless `types` says otherwise."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in aligned or signature[name].startswith("*")
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    return triton.compile(
        ASTSource(kernel, signature, places, attributes), target=GPUTarget("cuda", 90, 32), options=options
    )
