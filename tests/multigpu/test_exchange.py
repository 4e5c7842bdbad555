"""The exchange through symmetric memory on two GPUs: equal to the collective one, captured, and with too few rows."""

import json
from typing import Any

import pytest

from tests.multigpu.exchange_worker import CASES
from tests.multigpu.launch import torchrun

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu, pytest.mark.timeout(900)]

# bf16 partial sums; rows, gates and counts are copies
OUTPUTS = {"rows": 0, "gates": 0, "counts": 0, "output": 5e-3, "tokens": 5e-3, "gate gradients": 1e-2, "residual": 0}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    path = tmp_path_factory.mktemp("exchange") / "results.json"
    finished = torchrun(2, "exchange_worker.py", str(path))
    assert path.exists(), finished.stdout[-4000:]
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_equals_the_collective_exchange(case: str, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for error, (name, tolerance) in zip(found[case], OUTPUTS.items(), strict=True):
            assert error <= tolerance, name


def test_a_replay_reads_new_tokens_and_routes(ranks: list[dict[str, Any]]) -> None:
    assert max(error for found in ranks for error in found["captured"]) <= 5e-3


def test_rows_beyond_the_capacity_are_counted(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        needed, noticed, kept, capacity = found["overflow"]
        assert noticed == needed > capacity == kept
