"""Inventory of this machine for training: hardware, packages and programs, and the consequence of each missing one.

Only the standard library of Python 3.9, since this must run where nothing is installed. Versions come from the
environment's metadata; torch is queried in another process, since a broken CUDA installation can crash or hang the
process that imports it. Output: tools/doctor_page.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# the pinned megatron-core has wheels for these
PYTHONS = ("3.12", "3.13")
NO_LINUX = "megatron-core has wheels for Linux only: use WSL 2 or a container"
NO_PYTHON = f"the pinned megatron-core has wheels for Python {' and '.join(PYTHONS)} only: install one"
HOPPER = [9, 0]
MIN_DISK_GIB = 5
TOO_LITTLE_DISK = f"under {MIN_DISK_GIB} GiB: .venv alone takes that, and checkpoints need more"
UNUSABLE_GPU = "runs would use the CPU: torch's CUDA is newer than the driver, or torch is a CPU build"
TORCH_QUERY = """
import json, torch
facts = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        facts["gpus"].append([gpu.name, gpu.total_memory / 2**30, [gpu.major, gpu.minor]])
if torch.distributed.is_nccl_available():
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
print(json.dumps(facts))
"""
# optional requirement -> consequence of its absence; all others in requirements.txt are required
OPTIONAL = {
    "wandb": "runs are recorded in metrics.jsonl and report.html alone",
    "datasets": "saved Hugging Face datasets cannot be read; text, JSONL and parquet can",
    "pyarrow": "parquet files and saved datasets cannot be read; text and JSONL can",
}
# package -> consequence of its absence on a GPU
GPU_PACKAGES = {
    "transformer-engine": "no FP8, and plain torch layers: slower, more memory",
    "triton": "no fused kernels at all: many times slower",
    "flash-linear-attention": "the gated delta rule runs as plain torch: many times slower",
    "flash-qla": "the gated delta rule runs on slower kernels (about half as fast on a Hopper)",
    "tilelang": "FlashQLA cannot run, and on a Hopper flash-linear-attention refuses Triton 3.4 to 3.7.0 "
    "(wrong gradients), so the gated delta rule runs as plain torch",
}


@dataclass(frozen=True)
class Finding:
    """One item of the inventory.

    `state` is "here", "other" (present in another version), "absent" (a run is possible, with the consequence `cost`)
    or "broken" (a run is not possible).
    """

    section: str
    name: str
    found: str
    state: str = "here"
    cost: str = ""


def collect_findings() -> list[Finding]:
    """Return all findings, in the order of the page."""
    smi, torch = query_nvidia_smi(), query_torch()
    return [
        *system(),
        *required_packages(torch),
        *gpus(smi, torch),
        *gpu_packages(bool(smi)),
        *programs(bool(smi)),
        *services(),
    ]


def output_of(*command: str, seconds: float = 120) -> str | None:
    """Return a program's output, or None if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def system() -> list[Finding]:
    """Return the findings on system, Python, cores, memory and disk."""
    python = "{}.{}".format(*sys.version_info)
    linux = sys.platform == "linux"
    disk = shutil.disk_usage(ROOT)
    free, memory = disk.free / 2**30, memory_gib()
    return [
        Finding("machine", "system", platform.platform(), *([] if linux else ["broken", NO_LINUX])),
        Finding(
            "machine",
            "Python",
            f"{platform.python_version()}, {sys.executable}",
            *([] if python in PYTHONS else ["broken", NO_PYTHON]),
        ),
        Finding("machine", "cores", str(len(os.sched_getaffinity(0)) if linux else os.cpu_count())),
        Finding("machine", "memory", f"{memory:.0f} GiB" if memory else "unknown"),
        Finding(
            "machine",
            "disk",
            f"{free:.0f} GiB free of {disk.total / 2**30:.0f} at {ROOT}",
            *([] if free > MIN_DISK_GIB else ["absent", TOO_LITTLE_DISK]),
        ),
    ]


def memory_gib() -> float | None:
    """Return the memory this process may use: the machine's, or a container's limit below it."""
    sizes = re.findall(r"MemTotal:\s+(\d+) kB", read("/proc/meminfo"))
    gib = [int(size) / 2**20 for size in sizes]
    limits = map(read, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    gib += [int(limit) / 2**30 for limit in limits if limit.strip().isdigit()]
    return min(gib, default=None)


def read(path: str) -> str:
    """Return a small file's text, or an empty string if there is no such file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def pins() -> dict[str, str]:
    """Return the packages of requirements.txt and their exact versions."""
    lines = read(str(ROOT / "requirements.txt")).splitlines()
    return dict(line.split("==", 1) for line in lines if re.match(r"[\w.-]+==", line))


def version_of(package: str) -> str | None:
    """Return an installed package's version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def required_packages(torch: dict | str | None) -> list[Finding]:
    """Return the findings on the packages of requirements.txt, compared with their pins."""
    findings = []
    for package, pin in pins().items():
        version = version_of(package)
        if version is None:
            optional = package in OPTIONAL
            cost = OPTIONAL.get(package, "nothing runs: tools/quickstart installs it into .venv")
            findings.append(Finding("packages", package, "absent", "absent" if optional else "broken", cost))
        elif package == "torch" and isinstance(torch, str):
            findings.append(Finding("packages", package, version, "broken", torch))
        elif version.split("+")[0] != pin:
            exact = package == "megatron-core"
            cost = "the code depends on internals of this version" if exact else "not the version tested"
            state = "broken" if exact else "other"
            findings.append(Finding("packages", package, f"{version}, pinned {pin}", state, cost))
        else:
            findings.append(Finding("packages", package, version))
    return findings


def query_torch() -> dict | str | None:
    """Return torch's facts about CUDA; a sentence if torch cannot be imported; None if it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    command = [sys.executable, "-c", TORCH_QUERY]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    except subprocess.TimeoutExpired:
        return "its import hangs, so nothing runs (a stuck driver is a possible cause: try nvidia-smi)"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it crashed"])[-1]
        return f"it cannot be imported, so nothing runs: {last}"
    return json.loads(done.stdout.splitlines()[-1])


def query_nvidia_smi() -> list[list[str]]:
    """Return name, memory and driver version of each GPU of the driver."""
    query = "--query-gpu=name,memory.total,driver_version"
    return parse_nvidia_smi(output_of("nvidia-smi", query, "--format=csv,noheader") or "")


def parse_nvidia_smi(text: str) -> list[list[str]]:
    """Return the fields of each line; none for "No devices were found"."""
    rows = [[field.strip() for field in line.split(",")] for line in text.splitlines()]
    return [row for row in rows if len(row) == 3]


def gpus(smi: list[list[str]], torch: dict | str | None) -> list[Finding]:
    """Return the findings on GPUs, of the driver and of torch, and on NCCL."""
    facts = torch if isinstance(torch, dict) else {}
    torch_gpus, nccl = facts.get("gpus", []), facts.get("nccl")
    single_gpu = "a run cannot use several GPUs"
    nccl_finding = Finding("GPU", "NCCL", *([nccl] if nccl else ["absent", "absent", single_gpu]))
    if not smi and not torch_gpus:
        cost = "training runs on the CPU, in fp32, for tiny models; no FP8, no fused kernels"
        return [Finding("GPU", "NVIDIA GPU", "none", "absent", cost), nccl_finding]
    names = [f"{name}, {memory}" for name, memory, _ in smi]
    names = names or [f"{name}, {memory:.0f} GiB" for name, memory, _ in torch_gpus]
    findings = [Finding("GPU", "NVIDIA GPU", f"{len(names)} × {names[0]}")]
    findings += [Finding("GPU", "driver", smi[0][2])] if smi else []
    return [*findings, torch_on_cuda(facts), nccl_finding]


def torch_on_cuda(facts: dict) -> Finding:
    """Return the finding on torch's use of the GPU."""
    name = "torch on CUDA"
    if not facts.get("gpus"):
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            hidden = "runs use the CPU: CUDA_VISIBLE_DEVICES hides the GPUs"
            return Finding("GPU", name, "sees no GPU", "absent", hidden)
        return Finding("GPU", name, "sees no GPU", "broken", UNUSABLE_GPU)
    capability = facts["gpus"][0][2]
    found = "CUDA {}, compute capability {}.{}".format(facts["cuda"], *capability)
    if capability < HOPPER:
        old = "the fused kernels and FP8 require Hopper (9.0) or newer; everything else runs"
        return Finding("GPU", name, found, "absent", old)
    return Finding("GPU", name, found)


def gpu_packages(has_gpu: bool) -> list[Finding]:
    """Return the findings on the packages of requirements-gpu.txt and on apex."""
    findings = []
    for package, cost in GPU_PACKAGES.items():
        version = version_of(package)
        absent = Finding("fused kernels", package, "absent", "absent", on_a_gpu(cost, has_gpu))
        findings.append(Finding("fused kernels", package, version) if version else absent)
    apex = importlib.util.find_spec("apex")
    folders = list(apex.submodule_search_locations or []) if apex else []
    if any((Path(folder) / "multi_tensor_apply").is_dir() for folder in folders):
        return [*findings, Finding("fused kernels", "apex", version_of("apex") or "present")]
    cost = "a slower optimizer step, unless transformer-engine is installed"
    what = "absent (PyPI's apex is installed, which is another package)" if apex else "absent"
    return [*findings, Finding("fused kernels", "apex", what, "absent", on_a_gpu(cost, has_gpu))]


def on_a_gpu(cost: str, has_gpu: bool) -> str:
    """Return the consequence, qualified on a machine without a GPU."""
    return cost if has_gpu else f"nothing on a CPU; with a GPU: {cost}"


def programs(has_gpu: bool) -> list[Finding]:
    """Return the findings on compilers."""
    build = "Triton cannot build its launchers, and transformer-engine's part for torch cannot be built"
    kernels = "TileLang cannot compile FlashQLA, and transformer-engine's part for torch cannot be built"
    nvcc = output_of("nvcc", "--version") or ""
    release = re.search(r"release [\d.]+", nvcc)
    compiler = next(filter(shutil.which, [os.environ.get("CC", "gcc"), "gcc", "clang"]), None)
    version = (output_of(compiler, "--version") or "").partition("\n")[0] if compiler else ""
    return [
        Finding("programs", "C compiler", version)
        if version
        else Finding("programs", "C compiler", "absent", "absent", on_a_gpu(build, has_gpu)),
        Finding("programs", "nvcc", release[0])
        if release
        else Finding("programs", "nvcc", "absent", "absent", on_a_gpu(kernels, has_gpu)),
    ]


def services() -> list[Finding]:
    """Return the finding on Slurm."""
    slurm = output_of("sbatch", "--version", seconds=20)
    if slurm:
        return [Finding("cluster", "Slurm", slurm)]
    cost = "no jobs; runs are started manually, or with torchrun on one machine"
    return [Finding("cluster", "Slurm", "absent", "absent", cost)]
