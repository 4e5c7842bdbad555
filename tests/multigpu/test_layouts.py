"""Every layout on two GPUs trains as one GPU does from the same checkpoint, as a CUDA graph where the plan says so.

Tolerances are those of bf16: other layouts sum in another order. fp32 comparisons run on CPUs
(tools/checks/check_layout.py).
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.multigpu.launch import torchrun
from tests.multigpu.layouts import ALONE, LAYOUTS

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu, pytest.mark.timeout(900)]

GRAPHS = ("dp2", "dp2 fp8", "ep2", "ep2 recompute", "ep2 fp8", "tp2", "tp2 ep2", "cp2", "cp2 passing", "cp2 ep2")
EAGER = ("ep2 eager", "ep2 alltoall", "ep2 alltoall fp8", "tp2 eager", "pp2")
OTHERS = ("ep2 overflow",)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Losses and norms of every layout, of one process and of two."""
    folder = tmp_path_factory.mktemp("layouts")
    merged: dict[str, Any] = {}
    for processes, layouts in ((1, ALONE), (2, LAYOUTS)):
        found: dict[str, Any] = {}
        while missing := [name for name in layouts if name not in found]:
            finished = torchrun(processes, "worker.py", str(folder))
            found = results_of(folder, processes)
            assert any(name in found for name in missing), finished.stdout[-4000:]
        merged |= found
    return merged


def results_of(folder: Path, processes: int) -> dict[str, Any]:
    """Return the results of all layouts that any rank finished; an error of one rank is the layout's result."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob(f"results-{processes}.*.json")):
        for name, result in json.loads(path.read_text()).items():
            if name not in found or "error" in result:
                found[name] = result
    # a rank that was ended while it waited has none
    for path in folder.glob(f"results-{processes}.*.json"):
        path.write_text(json.dumps(found))
    return found


@pytest.mark.parametrize("name", [*GRAPHS, *EAGER, *OTHERS])
def test_trains_as_one_gpu(name: str, results: dict[str, Any]) -> None:
    found, alone = results[name], results["one fp8" if "fp8" in name else "one"]
    assert "error" not in found, found["error"]
    assert found["losses"] == pytest.approx(alone["losses"], rel=2e-2 if "fp8" in name else 5e-3)
    assert found["mtp"] == pytest.approx(alone["mtp"], rel=2e-2 if "fp8" in name else 5e-3)
    assert found["norms"] == pytest.approx(alone["norms"], rel=5e-2)
    assert alone["losses"][-1] < 0.9 * alone["losses"][0], "too little is learnt for a wrong gradient to show"


@pytest.mark.parametrize("name", GRAPHS)
def test_is_one_cuda_graph(name: str, results: dict[str, Any]) -> None:
    assert results[name]["graph"], results[name]["plan"]["training step"]
    assert results[name]["repeated"] == 0


@pytest.mark.parametrize("name", EAGER)
def test_runs_without_a_graph(name: str, results: dict[str, Any]) -> None:
    assert not results[name]["graph"]


def test_a_step_that_overflows_is_repeated(results: dict[str, Any]) -> None:
    """With half of the rows that are needed every replayed step overflows: the two steps before are not replayed."""
    assert results["ep2 overflow"]["repeated"] == len(results["one"]["losses"]) - 2
