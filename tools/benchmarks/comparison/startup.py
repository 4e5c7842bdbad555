"""Time from process start to the end of the first optimizer step, with empty and then with filled compile caches.

Each start is a new process that runs `tools/benchmarks/bench.py steps` for one step.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_q3n.config import UserError

# all compile caches of the GPU stack
CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TILELANG_CACHE_DIR": "tilelang",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TVM_FFI_CACHE_DIR": "tvm_ffi",
    "CUDA_CACHE_PATH": "cuda",
    "XDG_CACHE_HOME": "xdg",
}


def measure(arguments: list[str], warm_starts: int) -> dict[str, Any]:
    """Start once with empty caches, then `warm_starts` times with filled ones.

    Returns: seconds and phases of each start, in order.
    Raises: UserError if the recipe cannot run.
    """
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder) / part) for name, part in CACHES.items()}
        starts = [_start(arguments, caches, Path(folder)) for _ in range(1 + warm_starts)]
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    figures: dict[str, Any] = {
        "recipe": starts[0]["recipe"],
        "device": starts[0]["device"],
        "cold_seconds": starts[0]["time_to_first_step"],
        "warm_seconds": min(start["time_to_first_step"] for start in starts[1:]),
        "caches_mib": size / 2**20,
    }
    for name, start in zip(("cold_phases", *(f"warm_phases_{i + 1}" for i in range(warm_starts))), starts):
        figures[name] = start["phases_seconds"]
        figures[name.replace("phases", "checks")] = start["checks_seconds"]
    figures["cold_kernels"], figures["warm_kernels"] = (start["kernels"] for start in starts[:2])
    return figures


def _start(arguments: list[str], caches: dict[str, str], folder: Path) -> dict[str, Any]:
    result = folder / "figures.json"
    tool = Path(__file__).resolve().parents[1] / "bench.py"
    command = [sys.executable, str(tool), "steps", "--steps", "1", "--warmup", "0"]
    done = subprocess.run(
        [*command, "--json", str(result), *arguments],
        env={**os.environ, **caches},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise UserError(f"the timed run failed with {done.returncode}:\n{done.stdout[-3000:]}")
    figures = json.loads(result.read_text())
    phases = ", ".join(f"{name} {took:.1f}" for name, took in figures["phases_seconds"].items())
    print(f"first step after {figures['time_to_first_step']:.1f} s: {phases}", flush=True)
    return figures
