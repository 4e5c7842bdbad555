"""tools/doctor: its findings and their consequences on any machine and terminal width, and its exit status.

Findings on GPUs are tested with captured output of nvidia-smi and torch; no GPU is used.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tools import machine

ROOT = Path(__file__).parents[2]
H200 = "NVIDIA H200, 143771 MiB, 580.159.04\nNVIDIA H200, 143771 MiB, 580.159.04\n"
TORCH = {"version": "2.11.0", "cuda": "13.0", "gpus": [["NVIDIA H200", 139.8, [9, 0]]]}


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "tools/doctor", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_json_has_all_findings() -> None:
    done = doctor("--json", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    found = {finding["name"]: finding for finding in report["findings"]}
    assert found["megatron-core"]["found"] == metadata.version("megatron-core")
    names = ["Python", "cores", "memory", "disk", "torch", "wandb", "NVIDIA GPU", "NCCL", "nvcc"]
    names += ["transformer-engine", "flash-linear-attention", "flash-qla", "tilelang", "apex"]
    assert {*names, "triton", "C compiler", "Slurm"} <= found.keys()
    for finding in report["findings"]:
        assert (finding["state"] == "here") == (finding["cost"] == ""), finding


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a Python without packages."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True)
    return str(folder / "bin/python")


@pytest.mark.parametrize("columns", [34, 80, 200])
def test_a_bare_python_gets_a_list_of_what_is_missing_at_any_width(columns: int, bare_python: str) -> None:
    done = doctor(PYTHON=bare_python, COLUMNS=str(columns))
    assert done.returncode == 1
    assert max(map(len, done.stdout.splitlines())) <= min(columns, 120)
    assert "Traceback" not in done.stderr
    text = " ".join(done.stdout.split())
    assert "A run cannot start here: torch, megatron-core, numpy" in text
    assert "wandb" not in text[text.index("A run cannot") :]
    marked = [line for line in done.stdout.splitlines() if line.startswith(" ! numpy")]
    assert marked == [" ! numpy: absent" if columns < 72 else f" ! numpy{'':19}absent"]
    assert "runs are recorded in metrics.jsonl and report.html alone" in text


def test_unknown_arguments_exit_with_2() -> None:
    assert doctor("--jsn", PYTHON=sys.executable).returncode == 2


def states(findings: list[machine.Finding]) -> dict[str, tuple[str, str]]:
    return {finding.name: (finding.state, finding.found) for finding in findings}


def test_gpus_of_driver_and_torch() -> None:
    found = states(machine.gpus(machine.parse_nvidia_smi(H200), {**TORCH, "nccl": "2.28.9"}))
    assert found == {
        "NVIDIA GPU": ("here", "2 × NVIDIA H200, 143771 MiB"),
        "driver": ("here", "580.159.04"),
        "torch on CUDA": ("here", "CUDA 13.0, compute capability 9.0"),
        "NCCL": ("here", "2.28.9"),
    }
    assert machine.parse_nvidia_smi("No devices were found\n") == []


@pytest.mark.parametrize(("capability", "state"), [([8, 0], "absent"), ([10, 0], "here")])
def test_an_older_gpu_runs_without_fused_kernels(capability: list[int], state: str) -> None:
    facts = {**TORCH, "gpus": [["NVIDIA", 80.0, capability]]}
    assert states(machine.gpus([], facts))["torch on CUDA"][0] == state


def test_a_gpu_that_torch_cannot_use_is_broken_unless_it_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    smi, no_gpus = machine.parse_nvidia_smi(H200), {**TORCH, "gpus": []}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert states(machine.gpus(smi, no_gpus))["torch on CUDA"][0] == "broken"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert states(machine.gpus(smi, no_gpus))["torch on CUDA"][0] == "absent"


def test_another_version_than_the_pinned_one_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: dict[str, Any] = {**machine.pins(), "torch": "2.10.0a0+nv", "megatron-core": "0.18.0"}
    monkeypatch.setattr(machine, "version_of", installed.get)
    found = states(machine.required_packages(None))
    assert found["torch"] == ("other", f"2.10.0a0+nv, pinned {machine.pins()['torch']}")
    assert found["megatron-core"][0] == "broken"
    assert found["numpy"][0] == "here"
    broken = states(machine.required_packages("it cannot be imported"))
    assert broken["torch"][0] == "broken"
