"""Parallel layouts against one process: the same samples, old log-probs and updates."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.rl.layout_ranks import LAYOUTS, world_of


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    done = subprocess.run(
        [sys.executable, "-m", "tests.rl.layout_ranks", str(folder)],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def results(folder: Path, layout: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{layout}-{rank}.json").read_text())


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_layout_equals_one_process(output: Path, layout: str) -> None:
    expected = results(output, "single")
    for rank in range(world_of(layout)):
        actual = results(output, layout, rank)
        assert actual.get("samples", expected["samples"]) == expected["samples"]
        assert actual.get("routes", expected["routes"]) == expected["routes"]
        for logprobs, expected_logprobs in zip(actual["old"], expected["old"], strict=True):
            assert logprobs == pytest.approx(expected_logprobs, abs=2e-5)
        assert actual["mismatch"][0] < 1e-4
        assert max(actual["mismatch"][1:]) == 0.0
        for values, expected_values in zip(actual["updates"], expected["updates"], strict=True):
            assert values == pytest.approx(expected_values, rel=2e-3, abs=2e-5)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_single_process_is_a_meaningful_reference(output: Path) -> None:
    """Responses and scores differ, and the second update is off-policy; else equality proves little."""
    expected = results(output, "single")
    assert len({tuple(tokens) for _, tokens, _, _ in expected["samples"]}) > 6
    assert len({advantage for *_, advantage in expected["samples"]}) > 3
    (_, _, first_ratio, *_), (_, second_norm, second_ratio, *_) = expected["updates"]
    assert first_ratio == pytest.approx(1, abs=1e-6)
    assert abs(second_ratio - 1) > 1e-4
    assert second_norm > 0
