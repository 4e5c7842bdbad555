"""Compilation of the Triton kernels for Hopper, without a GPU; the other tests run them in the interpreter.

The grouped GEMM must keep its two loops flattened, which Triton's pass easily fails to do; the decode kernels must fit
into registers and shared memory at the sizes of every recipe. Speed is not covered
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

VARIANTS = [(transposed, block_n, False) for transposed in (False, True) for block_n in (256, 128)]
# head dim, query heads per group, new tokens, window: one token and drafts of the small and the released model, more
# rows than BLOCK_M, and a sliding window
ATTENTION = [(128, 4, 1, None), (256, 8, 1, None), (256, 8, 16, None), (64, 8, 3, 100)]
# key heads, value heads, head dim
GATED_DELTA = [(4, 8, 128), (16, 32, 128), (2, 4, 64)]
# experts, top-k, with the GEMM, with the norm: the small and the released model
ROUTERS = [(64, 4, True, False), (64, 4, True, True), (512, 10, False, False)]
# input rows, widths of the inputs, output width, options: of the small model the input and output projections of a
# mixer, the MTP layer's projection and the LM head; of the released one those, and the router
GEMMS = [
    (1, 512, 0, 3072, "norm second_weight"),
    (5, 512, 0, 3072, "norm second_weight"),
    (16, 512, 0, 2560, "norm"),
    (1, 1024, 0, 512, "residual"),
    (8, 1024, 0, 512, "residual"),
    (5, 512, 512, 512, "norm"),
    (5, 512, 0, 8192, "norm returns_normed"),
    (6, 2048, 0, 12288, "norm second_weight"),
    (6, 4096, 0, 2048, "residual"),
    (6, 2048, 2048, 2048, "norm"),
    (1, 2048, 0, 151936, "norm returns_normed"),
    (6, 2048, 0, 151936, "norm returns_normed"),
    (16, 2048, 0, 512, "norm returns_normed fp32"),
]
HERE = Path(__file__)
HOPPER_SHARED_BYTES = 227 * 1024


def run_in_compiling_process(function: str) -> list[str]:
    """Return the output of a function of this file, run in a process of its own without Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({str(HERE)!r})[{function!r}]()"]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_grouped_gemms_use_tensor_cores() -> None:
    printed = run_in_compiling_process("compile_grouped_gemms")
    assert printed == ["wgmma"] * (len(VARIANTS) + 1)


def test_fp8_weight_gradients_use_tensor_cores() -> None:
    """No register is spilled, and the next tile's loads begin before a tile is written."""
    printed = run_in_compiling_process("compile_fp8_weight_gradients")
    assert printed == ["fits", "wgmma", "prefetch"] * 2 + ["fits"] * 2


def test_decode_kernels_fit() -> None:
    """No register is spilled, and shared memory suffices."""
    printed = run_in_compiling_process("compile_decode_kernels")
    assert printed == ["fits"] * (2 * len(ATTENTION) + len(ROUTERS) + len(GATED_DELTA) + 4)


def test_decode_gemms_fit_and_vectorize_their_loads() -> None:
    """16 bytes per load, whose alignment a branch could hide from the compiler; at most one barrier per stored row."""
    printed = run_in_compiling_process("compile_decode_gemms")
    assert printed == ["fits"] * len(GEMMS)


def test_mixer_kernels_fit_and_prefetch() -> None:
    """The released model's convolution, norm and QKV kernels; the convolution must prefetch its tokens."""
    printed = run_in_compiling_process("compile_mixer_kernels")
    assert printed == ["prefetch", "fits"] * 2 + ["fits"] * 4


def compile_mixer_kernels() -> None:
    """Compile, and print for each kernel whether it fits."""
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
        compiled = _compiled(kernel, constants, types, strides, {"num_warps": mixer_inputs_triton._WARPS})
        print("prefetch" if "cp.async.cg" in compiled.asm["ptx"] else "no prefetch")
        _print_fits(compiled)
    row = {"WIDTH": 2048, "BLOCK_H": 2048}
    options = {"num_warps": residual_norm_triton._FORWARD_WARPS}
    _print_fits(_compiled(residual_norm_triton._residual_norm_kernel, row, types, (), options))
    launch = dict(residual_norm_triton._BACKWARD)
    options = {"num_warps": launch.pop("num_warps")}
    constants = {**row, **launch, "NUM_CONSUMERS": 4, "HAS_DRESIDUAL": True}
    backward = residual_norm_triton._residual_norm_backward_kernel
    _print_fits(_compiled(backward, constants, types, ("tokens",), options))
    group = {"NUM_GROUPS": 2, "QUERIES_PER_GROUP": 8, "GATED": True, "DIM": 256, "ROTARY_DIM": 64}
    for kernel, launch in (
        (qkv_norm_rope_triton._qkv_norm_rope_kernel, dict(qkv_norm_rope_triton._FORWARD)),
        (qkv_norm_rope_triton._qkv_norm_rope_backward_kernel, dict(qkv_norm_rope_triton._BACKWARD)),
    ):
        options = {"num_warps": launch.pop("num_warps")}
        _print_fits(_compiled(kernel, {**group, **launch}, types, ("rows",), options))


def compile_grouped_gemms() -> None:
    """Compile, and print for each whether it uses the tensor cores."""
    for transposed, block_n, scaled in [*VARIANTS, (False, 256, True)]:
        ptx = _compile_grouped_gemm(transposed, block_n, scaled).asm["ptx"]
        print("wgmma" if "wgmma.mma_async" in ptx else "slow")


def compile_fp8_weight_gradients() -> None:
    """Compile the GEMM, overwriting and accumulating, and the transposition, with and without gather."""
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
            "NUM_PROGRAMS": 132,
            "TILES_PER_PROGRAM": 64,
            "BLOCKS_PER_SUM": module._BLOCKS_PER_SUM,
        }
        options = {"num_warps": warps, "num_stages": stages}
        kernel = _compiled(module._fp8_wgrad_kernel, constants, types, ("N", "K"), options)
        _print_fits(kernel)
        print("wgmma" if "wgmma.mma_async" in kernel.asm["ptx"] else "slow")
        loop = kernel.asm["ttgir"].partition("scf.for")[2]
        print("prefetch" if 0 < loop.find("async_tma_copy") < loop.find("tt.store") else "no prefetch")
    types = {"x_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "out_scale_ptr": "*fp32"}
    lists = ("source_ptr", "out_ptr", "ends_ptr", "expert_ptr", "row_ptr", "count_ptr")
    types |= dict.fromkeys(lists, "*i32")
    sizes = {"BLOCK_R": 128, "BLOCK_C": module._TRANSPOSE_BLOCK_C, "SCALES_PER_STEP": module._SCALES_PER_STEP}
    for no_gather in ({}, {"source_ptr": None}):
        options = {"num_warps": module._TRANSPOSE_WARPS}
        _print_fits(_compiled(module._transpose_kernel, {**sizes, **no_gather}, types, ("WIDTH",), options))


def compile_decode_kernels() -> None:
    """Compile, and print for each kernel whether it fits."""
    _compile_decode_attention()
    _compile_decode_router()
    _compile_decode_argmax()
    _compile_decode_gated_delta()


def compile_decode_gemms() -> None:
    """Compile, print for each whether it fits, and count loads and barriers in its PTX."""
    from megatron_q3n.kernels.decode import gemm_triton as module

    types = {"eps": "fp32"}
    for rows, width, second_width, outputs, options_text in GEMMS:
        constants: dict[str, Any] = {
            "R": rows,
            "X": width,
            "Y": second_width,
            "HAS_NORM": "norm" in options_text.split(),
            "WEIGHT_OFFSET": 1.0,
            "ALIGNED": True,
            "HAS_SECOND_WEIGHT": "second_weight" in options_text,
            "HAS_RESIDUAL": "residual" in options_text,
            "STORE_NORMED": "returns_normed" in options_text,
            **module.block_sizes(rows, outputs, width),
        }
        option_of = {
            "norm_ptr": "norm",
            "second_weight_ptr": "second_weight",
            "second_out_ptr": "second_weight",
            "residual_ptr": "residual",
            "normed_ptr": "returns_normed",
        }
        constants |= {name: None for name, option in option_of.items() if option not in options_text.split()}
        if not second_width:
            constants |= {"y_ptr": None, "y_norm_ptr": None}
        out_type = {"out_ptr": "*fp32"} if "fp32" in options_text else {}
        aligned, options = (("N", "M", "x_stride", "y_stride", "residual_stride"), {"num_warps": module.NUM_WARPS})
        kernel = _compiled(module._decode_gemm_kernel, constants, {**types, **out_type}, aligned, options)
        ptx = kernel.asm["ptx"]
        # loads of 16 bytes by 32 lanes
        num_loads = constants["BLOCK_N"] * constants["BLOCK_K"] // 256
        assert ptx.count("ld.global.v4.b32") >= num_loads, (rows, width, outputs, options_text)
        assert ptx.count("bar.sync") <= rows + 1, (rows, width, outputs, options_text)
        _print_fits(kernel)


def _compile_decode_argmax() -> None:
    from megatron_q3n.kernels.decode import argmax_triton as module

    types = dict.fromkeys(("max_ptr", "sum_ptr", "argmax_value_ptr"), "*fp32")
    types |= dict.fromkeys(("drafts_ptr", "chosen_ptr", "num_new_tokens_ptr", "row_ptr"), "*i64")
    types |= {"argmax_ptr": "*i32", "packed_ptr": "*fp64"}
    options = {"num_warps": module.NUM_WARPS}
    _print_fits(_compiled(module._reduce_kernel, {"BLOCK_V": module.BLOCK_V}, types, ("V",), options))
    block, types = {"BLOCK_V": 2**14}, {**types, "out_ptr": "*i64"}
    _print_fits(_compiled(module._argmax_kernel, block, types, ("logits_stride",), options))
    # no draft with the small model's vocabulary, four drafts with the released one's
    for sizes in ({"T": 1, "TP": 1, "PP": 2}, {"T": 5, "TP": 8, "PP": 64}):
        _print_fits(_compiled(module._verify_kernel, sizes, types, ("V",), {"num_warps": 4}))


def _compile_decode_gated_delta() -> None:
    """No vector is recomputed by every thread that reads it, and warps do not synchronize inside the rule."""
    from megatron_q3n.kernels.decode import gated_delta_triton as module

    fp32 = dict.fromkeys(("a_log_ptr", "dt_bias_ptr", "norm_ptr", "delta_ptr"), "*fp32")
    types = {**fp32, "delta_out_ptr": "*fp32", "scale": "fp32", "eps": "fp32"}
    strides = ("stride_t", "stride_b", "ba_stride_t", "ba_stride_b")
    for keys, values, dim in GATED_DELTA:
        sizes = {"KEY_HEADS": keys, "VALUE_HEADS": values, "DIM": dim, "CONV_KERNEL_SIZE": 4}
        constants: dict[str, Any] = {**sizes, **module.block_sizes(dim, values)}
        options = {"num_warps": constants["NUM_WARPS"]}
        kernel = _compiled(module._decode_gated_delta_kernel, constants, types, strides, options)
        ptx = kernel.asm["ptx"]
        assert ptx.count("ld.global.v4.b32") == dim * dim // 128 // constants["NUM_WARPS"]
        assert ptx.count("ld.global") < ptx.count("ld.global.v4.b32") + 40 * dim // 32
        assert ptx.count("bar.sync") <= 16
        _print_fits(kernel)


def _compile_decode_router() -> None:
    from megatron_q3n.kernels.decode import router_triton as module
    from megatron_q3n.kernels.decode.operands import RMSNormWeights, RouterConfig

    fp32 = dict.fromkeys(("logits_ptr", "bias_ptr", "gates_ptr"), "*fp32")
    types = {**fp32, "experts_ptr": "*i64", "scaling": "fp32", "eps": "fp32"}
    for experts, topk, has_gemm, normed in ROUTERS:
        norm = RMSNormWeights(torch.zeros(1), 1e-6) if normed else None
        constants: dict[str, Any] = {
            **module.constants(experts, RouterConfig(topk), 512 if has_gemm else 0, norm),
            "bias_ptr": None,
        }
        constants |= {"logits_ptr": None} if has_gemm else {"x_ptr": None, "weight_ptr": None}
        if not normed:
            constants |= {"norm_ptr": None, "normed_ptr": None}
        warps = module.NUM_WARPS_GEMM if has_gemm else module.NUM_WARPS
        _print_fits(_compiled(module._decode_router_kernel, constants, types, (), {"num_warps": warps}))


def _compile_decode_attention() -> None:
    from megatron_q3n.kernels.decode import attention_triton as module
    from megatron_q3n.kernels.decode.operands import AttentionHeads

    types = {"start_ptr": "*i64", "scale": "fp32", "eps": "fp32"}
    types |= dict.fromkeys(("core_ptr", "max_ptr", "sum_ptr"), "*fp32")
    for dim, queries, tokens, window in ATTENTION:
        heads = AttentionHeads(2, queries, dim, True, dim**-0.5, window)
        sizes = module.block_sizes(tokens, heads)
        shared = {"G": 2, "R": queries, "D": dim, "GATED": True, "WINDOWED": window is not None}
        shared["BLOCK_N"] = sizes["BLOCK_N"]
        attend = {**shared, "HALF": dim // 8, "HAS_NORM": True, "WEIGHT_OFFSET": 1.0, "BLOCK_M": sizes["BLOCK_M"]}
        combine = {**shared, "SPLITS_PER_STEP": module.SPLITS_PER_STEP, "CHANNELS": min(module.CHANNELS, dim)}
        strides = ("stride_t", "stride_n", "cache_stride_n", "cache_stride_g")
        _print_fits(_compiled(module._attend_kernel, attend, types, strides, module.LAUNCH))
        _print_fits(_compiled(module._combine_kernel, combine, types, strides, {"num_warps": 4}))


def _print_fits(kernel: Any) -> None:
    usage = _resource_usage(kernel.asm["cubin"])
    fits = usage["STACK"] == usage["LOCAL"] == 0 and kernel.metadata.shared < HOPPER_SHARED_BYTES
    print("fits" if fits else f"{kernel.metadata.name}:{usage}".replace(" ", ""))


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Return a kernel's resource usage: REG registers per thread, STACK and LOCAL bytes of spills, …"""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", output)}


def _compile_grouped_gemm(transposed: bool, block_n: int, scaled: bool) -> Any:
    from megatron_q3n.kernels.moe import grouped_gemm_triton as module

    is_wide = block_n == 256
    element, size = ("fp8e4nv", 1) if scaled else ("bf16", 2)
    block_k = 128 // size
    tile = (block_k, block_n) if transposed else (block_n, block_k)
    constants = {
        "TRANSPOSED": transposed,
        "SCALED": scaled,
        "BLOCK_M": module.BLOCK_R,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "SPLIT_STORE": is_wide,
        "NUM_PROGRAMS": 132,
    }
    if not scaled:
        constants |= {"row_scale_ptr": None, "weight_scale_ptr": None}
    types = {
        "rows_desc": f"tensordesc<{element}[{module.BLOCK_R}, {block_k}]>",
        "weight_desc": f"tensordesc<{element}[{tile[0]}, {tile[1]}]>",
        "out_desc": f"tensordesc<bf16[{module.BLOCK_R}, {block_n // 2 if is_wide else block_n}]>",
        "out_ptr": "*bf16",
        "row_scale_ptr": "*fp32",
        "weight_scale_ptr": "*fp32",
        **dict.fromkeys(("ends_ptr", "expert_ptr", "row_ptr", "count_ptr"), "*i32"),
    }
    warps, stages = (module._WIDE if is_wide else module._NARROW)[1:]
    options = {"num_warps": warps, "num_stages": stages}
    return _compiled(module._grouped_gemm_kernel, constants, types, ("N", "K"), options)


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
    values = {(names.index(name),): value for name, value in constants.items()}
    return triton.compile(
        ASTSource(kernel, signature, values, attributes), target=GPUTarget("cuda", 90, 32), options=options
    )
