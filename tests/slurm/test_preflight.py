"""Pre-flight check: nvidia-smi's table, the disk, and the network between nodes simulated by processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.preflight import disk_problems, read_gpus
from tests.slurm.runs import ROOT, SITE

SETTINGS = {**SITE["preflight"], "gpus_expected": 0, "minimum_gpu_free_mib": 0, "master_address": "127.0.0.1"}


@pytest.mark.parametrize(
    ("table", "complaints"),
    [
        ("0, 81000, 0\n1, 81000, 0\n", []),
        ("0, 81000, 0\n", ["1 of 2 found"]),
        ("0, 81000, 0\n1, 12, 0\n", ["gpu 1: only 12 MiB free"]),
        ("0, 81000, 4\n1, 81000, [N/A]\n", ["gpu 0: 4 uncorrected memory errors"]),
    ],
)
def test_gpus(table: str, complaints: list[str]) -> None:
    found = read_gpus(table, 2, 60000)
    assert len(found) == len(complaints)
    assert all(complaint in problem for complaint, problem in zip(complaints, found))


def test_a_full_and_a_slow_disk_are_reported(tmp_path: Path) -> None:
    assert disk_problems(tmp_path, SETTINGS) == []
    full = disk_problems(tmp_path, {**SETTINGS, "minimum_free_gib": 1e9})
    assert "1000000000.0 needed" in full[0]
    slow = disk_problems(tmp_path, {**SETTINGS, "minimum_disk_mib_per_second": 1e9})
    assert "MiB/s to" in slow[0]
    assert list(tmp_path.iterdir()) == [], "temporary files are deleted"


def node(folder: Path, number: int, count: int) -> "subprocess.Popen[str]":
    env = {"SLURM_NODEID": str(number), "SLURM_NNODES": str(count), "SLURMD_NODENAME": f"n{number}"}
    settings = json.dumps({**SETTINGS, "timeout_seconds": 4})
    return subprocess.Popen(
        [sys.executable, "-m", "slurm.preflight", str(folder), settings],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_nodes_reach_each_other(tmp_path: Path) -> None:
    started = [node(tmp_path, number, 3) for number in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs


def test_a_missing_node_is_reported_by_both_neighbors(tmp_path: Path) -> None:
    started = [node(tmp_path, number, 3) for number in (0, 1)]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    assert "nothing received from node 2" in outputs[0]
    assert "node 2 did not write its address" in outputs[1]
