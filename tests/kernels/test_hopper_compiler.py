"""The grouped product compiles for Hopper, without a GPU: Triton's pass that joins its two loops is easily upset, and
the interpreter of the other tests knows nothing of it. Registers and speed are not covered (tools/bench_kernels.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton ships with torch for Linux only")

VARIANTS = [(turned, columns, False) for turned in (False, True) for columns in (256, 128)]
HERE = Path(__file__)


def test_every_variant_compiles() -> None:
    # a process of its own, since the interpreter is chosen when Triton is imported
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        f"import runpy; runpy.run_path({str(HERE)!r})['compile_all']()",
    ]
    done = subprocess.run(
        command, env=environment, cwd=HERE.parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["wgmma"] * (len(VARIANTS) + 1)


def compile_all() -> None:
    """Compile, and say for each whether it multiplies on the tensor cores."""
    for turned, columns, scaled in [*VARIANTS, (False, 256, True)]:
        print("wgmma" if "wgmma.mma_async" in compiled(turned, columns, scaled) else "slow")


def compiled(turned: bool, columns: int, scaled: bool) -> str:
    """Return the kernel's PTX for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_q3n.kernels.fused import grouped_product as module

    kernel, wide = module._product_kernel, columns == 256
    element, size = ("fp8e4nv", 1) if scaled else ("bf16", 2)
    block_k = 128 // size
    tile = (block_k, columns) if turned else (columns, block_k)
    constants = {
        "TURNED": turned, "SCALED": scaled, "ROWS": module.BLOCK_R, "COLUMNS": columns,
        "BLOCK_K": block_k, "HALVES": wide, "PROGRAMS": 132,
    }  # fmt: skip
    if not scaled:
        constants |= {"row_scale_ptr": None, "weight_scale_ptr": None}
    types = {
        "rows_desc": f"tensordesc<{element}[{module.BLOCK_R}, {block_k}]>",
        "weight_desc": f"tensordesc<{element}[{tile[0]}, {tile[1]}]>",
        "out_desc": f"tensordesc<bf16[{module.BLOCK_R}, {columns // 2 if wide else columns}]>",
        "out_ptr": "*bf16", "N": "i32", "K": "i32", "row_scale_ptr": "*fp32", "weight_scale_ptr": "*fp32",
    }  # fmt: skip
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*i32") for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in ("N", "K") or signature[name].startswith("*")
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    warps, stages = (module._WIDE if wide else module._NARROW)[1:]
    return triton.compile(
        ASTSource(kernel, signature, places, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages},
    ).asm["ptx"]
